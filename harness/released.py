"""The authors' released checkpoints, read into our models without running any code from the files."""
import argparse
from pathlib import Path

from torch import Tensor, nn
from transformers import BertConfig, BertModel

from sources.files import BadInput, explained, read_weights
from tgdt import TGDT, first_layers
from user import USER, SelfGuidedEnhancement

TGDT_NAMES = {  # theirs -> ours; what is not listed takes no part in the forward pass
    "img_txt_enc.txt_enc.bert_model.": "bert.",
    "img_txt_enc.img_enc.pos_encoding_image.map.": "region_encoder.geometry.",
    "img_txt_enc.img_enc.transformer_encoder.": "region_encoder.encoder.",
    "img_txt_enc.img_proj.": "image_branch.project.",
    "img_txt_enc.cap_proj.": "text_branch.project.",
    "img_txt_enc.transformer_encoder_2.": "image_branch.local_encoder.",
    "img_txt_enc.transformer_encoder_1.": "text_branch.local_encoder.",
    "img_txt_enc.transformer_encoder_img.": "image_branch.global_encoder.",
    "img_txt_enc.transformer_encoder_text.": "text_branch.global_encoder.",
}
USER_IMAGE_NAMES = {
    "fc.": "project.", "mlp.layers.0.": "mlp_in.", "mlp.bns.0.": "mlp_norm.", "mlp.layers.1.": "mlp_out.",
    "gpool.gru.": "image_pool.gru.", "gpool.linear.": "image_pool.score.",
    "v_sa.embedding_local.0.": "guide.local.", "v_sa.embedding_local.1.": "guide.local_norm.",
    "v_sa.embedding_global.0.": "guide.picture.", "v_sa.embedding_global.1.": "guide.picture_norm.",
    "v_sa.embedding_common.0.": "guide.score.",
}
USER_TEXT_NAMES = {
    "bert.": "bert.", "linear.": "project_words.", "gpool.gru.": "text_pool.gru.", "gpool.linear.": "text_pool.score.",
}


def load_tgdt(path: str | Path, text_config: BertConfig | None = None) -> TGDT:
    """TGDT in eval mode, from the authors' `model_best_rsum.pth.tar`.

    text_config describes the BERT that was trained; None means `bert-base-uncased`. Raises BadInput, naming the file,
    if it is not such a checkpoint or its weights do not fit.
    """
    expected = "a released TGDT checkpoint"
    checkpoint = read_weights(Path(path), expected, allowed=(argparse.Namespace,))
    with explained(path, expected):
        weights, config = checkpoint["model"], checkpoint["config"]
        joint, image, text = config["model"], config["image-model"], config["text-model"]
        sizes = dict(feature_dim=image["feat-dim"], dim=joint["embed-size"], dropout=joint["dropout"],
                     region_layers=image["transformer-layers"], local_layers=joint["layers"],
                     global_layers=joint["layers"])
        bert = BertModel(text_config or BertConfig(), add_pooling_layer=False)
        model = TGDT(first_layers(bert, text["extraction-hidden-layer"]), **sizes, zero_image_token=True)
        weights = renamed(weights, TGDT_NAMES)
    return fill(model, path, weights)


def load_user(path: str | Path, text_config: BertConfig | None = None) -> USER:
    """USER with SGE in eval mode, from the authors' `model_best.pth`. Parameters and errors as in `load_tgdt`."""
    expected = "a released USER checkpoint"
    checkpoint = read_weights(Path(path), expected, allowed=(argparse.Namespace,))
    with explained(path, expected):
        (image, text), sharpness = checkpoint["model"], float(checkpoint["opt"].attention_lamda)
        dim, feature_dim = image["fc.weight"].shape
        regions = len(image["v_sa.embedding_local.1.weight"])
        weights = renamed(image, USER_IMAGE_NAMES) | renamed(text, USER_TEXT_NAMES)
    guide = SelfGuidedEnhancement(feature_dim, sharpness=sharpness, fixed_regions=regions)
    model = USER(BertModel(text_config or BertConfig(), add_pooling_layer=False), feature_dim, dim, guide)
    return fill(model, path, weights)


def renamed(weights: dict, names: dict[str, str]) -> dict:
    """Their weights under our names; `names` maps the beginnings. What is not a tensor is left out."""
    return {ours + name.removeprefix(theirs): weight for name, weight in weights.items()
            for theirs, ours in names.items() if name.startswith(theirs) and isinstance(weight, Tensor)}


def fill(model: nn.Module, path: str | Path, weights: dict) -> nn.Module:
    """The model in eval mode with these weights. Raises BadInput if one is missing or of another shape."""
    wanted = model.state_dict()
    try:
        model.load_state_dict({name: weight for name, weight in weights.items() if name in wanted})
    except RuntimeError as error:
        raise BadInput(f"{path}: {str(error).splitlines()[1].strip()[:200]}") from error
    return model.eval()
