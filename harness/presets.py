"""The presets: what each changes from the released configuration of TGDT, which the defaults of `settings.py` hold."""

PAPER_USER = dict(
    text_layers=12, noise=0.2, guide="self",
    epochs=20, batch_size=128, lr=5e-4, text_lr=0.1, weight_decay=1e-4, warmup=0, drop_every=10)
PAPER_COCO = dict(batch_size=40, warmup=0)
PAPER_COCO_USER = dict(epochs=25, drop_every=15, queue=4096, batch_weight=1.0)
PAPER_SCENES = dict(  # the scenes' features have 181 numbers, which the heads do not divide
    text_encoder="from-scratch", text_layers=2, noise=0.0, region_width=184)
SMALL = dict(  # for a laptop: all captions of an image in one batch; a constant rate, and the momentum copy is kept
    dim=256, region_width=512, region_layers=1, local_layers=1, global_layers=1, feedforward=1024,
    reduction="mean", reward_floor=False, momentum=0.997, keep="momentum",
    epochs=9, batch_size=160, captions_per_image=5, easy_epochs=1, lr=5e-4, text_lr=0.1, weight_decay=1e-4, warmup=100,
    schedule="constant")
SMALL_USER = dict(noise=0.2, guide="self", dim=1024, lr=1e-3, warmup=0)
SMALL_SCENES = dict(  # words learnt from scratch in three minutes on two cores; no noise, since every word counts
    text_encoder="from-scratch", text_layers=1, noise=0.0,
    dim=128, region_width=128, feedforward=256, dropout=0.0, momentum=0.99,
    epochs=5, batch_size=72, captions_per_image=3, lr=1e-3, text_lr=1.0, warmup=100, max_norm=20.0)
UNIFIED = dict(  # no paper has this model: USER's rates, with what `unified.py` needs
    guide="none", dim=256, reward_floor=False, infonce_weight=1.0, distill=0.5, reduction="mean", local_layers=2,
    local_weight=0.5)
UNIFIED_SCENES = dict(temperature=0.01, distill=0.0, local_weight=4.0)  # its words are learnt from scratch

PRESETS = {  # what is changed from the defaults, first for the model, then for the dataset
    ("paper", "tgdt"):      ({},                           {"coco": PAPER_COCO, "scenes": PAPER_SCENES}),
    ("paper", "user"):      (PAPER_USER,                   {"coco": PAPER_COCO_USER, "scenes": PAPER_SCENES}),
    ("paper", "tgdt-user"): (PAPER_USER | UNIFIED,         {"coco": PAPER_COCO_USER, "scenes": PAPER_SCENES}),
    ("small", "tgdt"):      (SMALL,                        {"scenes": SMALL_SCENES}),
    ("small", "user"):      (SMALL | SMALL_USER,           {"scenes": SMALL_SCENES}),
    ("small", "tgdt-user"): (SMALL | SMALL_USER | UNIFIED, {"scenes": SMALL_SCENES | UNIFIED_SCENES}),
}
