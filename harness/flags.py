"""The flags of both command lines. Those of `train.py` are made from the groups of `harness/settings.py`.

Nothing here imports torch, so that --help comes at once.
"""
import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from harness import __version__, qdrant, settings
from sources.files import BadInput

ABOUT = """\
Train a model, evaluate it, and leave everything in a run folder.

  python train.py                       the built-in scenes, in three minutes
  python train.py --dataset flickr30k   fetches what is missing
  python train.py --dataset folder --data-root DIR
                                        your own pictures and captions
  python train.py --model user          USER; tgdt-user is both papers in one

Ctrl-C saves the run and stops it; --resume goes on with it. The defaults below
are those of the --dataset, --model and --preset that you give with --help."""

ABOUT_SEARCH = """\
Evaluate a trained run, make an index of a corpus, search either.

  python retrieve.py evaluate RUN       recall, both directions
  python retrieve.py index RUN --out INDEX
                                        encode a split once, search it often
  python retrieve.py search RUN_OR_INDEX "a red ring"
                                        the images that fit a caption best
  python retrieve.py search RUN_OR_INDEX --image FILE
                                        the captions that fit an image best
  python retrieve.py page RUN_OR_INDEX  the same in a browser"""
DTYPES = ("float32", "float16", "bfloat16")


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations, fits 80 columns, and reports a mistake in two lines at most."""

    def __init__(self, **options: object):
        narrow = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=79)
        super().__init__(allow_abbrev=False, formatter_class=narrow, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As in argparse, which calls this for every parser. Also refuses two kinds of arguments that it accepts."""
        args = sys.argv[1:] if args is None else args
        for argument in args:
            if any("\ud800" <= letter <= "\udfff" for letter in argument):  # bytes that are not UTF-8
                self.error(f"argument {argument!r}: expected text in UTF-8")
            if argument.startswith("--") and argument.endswith("=--"):  # it would make an empty list of it
                self.error(f"argument {argument}: expected a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message, suggest the flag that is nearest to an unknown one, and exit with code 2."""
        words, hint = message.split(), f"{self.prog} --help lists all flags"
        unknown = words[2] if words[0] == "unrecognized" else ""
        name = unknown.split("=")[0].strip("-")
        if unknown and not unknown.startswith("-") and self.prog == "retrieve.py":
            hint = f"put quotes around a caption of several words; {hint}"
        elif unknown.startswith("-") and (near := difflib.get_close_matches(name, all_names(self), 1)) != [name]:
            hint = f"did you mean --{near[0]}? {hint}" if near else hint
        self.exit(2, f"error: {' '.join(words)}\n{hint}\n")


def all_names(parser: argparse.ArgumentParser) -> list[str]:
    """The names of all flags of a parser and of its commands, without the dashes."""
    names = []
    for action in parser._actions:
        names += [flag.strip("-") for flag in action.option_strings]
        if isinstance(action, argparse._SubParsersAction):
            names += [name for command in action.choices.values() for name in all_names(command)]
    return names


def not_empty(text: str) -> str:
    """A flag's text that may not be empty, as in --out "$X" with an X that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("found nothing, expected a name")
    return text


def path(text: str) -> Path:
    """A flag's file or folder."""
    return Path(not_empty(text)).expanduser()


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number in this range."""
    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {lowest} to {highest:,}")
        return int(text)

    return read


def parser(shown: settings.Settings) -> Parser:
    """The parser; --help shows the values of `shown` as the defaults."""
    out = Parser(prog="train.py", usage="python train.py [flags]", description=ABOUT, add_help=False)
    values = settings.flat(shown)
    for group, kind in settings.GROUPS.items():
        titled = out.add_argument_group(kind.__doc__)
        for name, known in settings.FIELDS.items():
            if known.group != group:
                continue
            note = known.help if values[name] in (None, "") else f"{known.help} (default {values[name]})"
            if known.type is bool:
                how = {"action": argparse.BooleanOptionalAction}
            elif known.choices:
                how = {"choices": known.choices}
            else:
                names = known.optional or name in ("text_encoder", "clip_model")
                how = {"type": not_empty if names else known.type,
                       "metavar": {int: "N", float: "X", str: "TEXT"}[known.type]}
            titled.add_argument(settings.flag(name), help=note, default=None, **how)
    other = out.add_argument_group("Everything else")
    other.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    other.add_argument("--workers", type=whole(0, 256), metavar="N",
                       help="processes that read features (default: up to 4 for a GPU) or decode pictures (up to 8); "
                            "0: no others")
    other.add_argument("--pieces", type=whole(1, 16_384), metavar="N", default=1,
                       help="encode a batch in N pieces, to save memory; only with --model tgdt (default 1)")
    other.add_argument("--out", type=path, metavar="DIR", help="run folder (default runs/<dataset>-<model>)")
    other.add_argument("--resume", action="store_true", help="go on with the run in --out, from its last checkpoint")
    other.add_argument("--fetch-only", action="store_true", help="fetch data and networks, and stop")
    other.add_argument("--quiet", action="store_true", help="no progress bar while training, no line after an epoch")
    other.add_argument("--log", choices=("tensorboard", "wandb"), help="send history.jsonl there too, if installed")
    other.add_argument("--print-settings", action="store_true", help="print all settings as JSON, and exit")
    other.add_argument("--version", action="version", version=__version__, help="print the version, and exit")
    other.add_argument("--help", "-h", action="help", help="print this, and exit")
    return out


def parse(argv: list[str] | None = None) -> tuple[dict, argparse.Namespace]:
    """The command line -> the settings that it gives (name -> value, None if not given), and the other flags.

    The others are device, workers, out, resume, quiet and so on. Paths become absolute, so that the run
    can be used from another folder. Exits with code 2 for a mistake in a flag. The values are checked later, by
    `settings.make`.
    """
    first = Parser(prog="train.py", add_help=False)  # it finds out which defaults --help shows
    for name in ("dataset", "model", "preset"):
        first.add_argument(f"--{name}")
    try:
        shown = settings.make(vars(first.parse_known_args(argv)[0]))
    except BadInput:
        shown = settings.make({})  # the whole parser will refuse the value
    options = parser(shown).parse_args(argv)
    given = {name: vars(options).pop(name) for name in settings.FIELDS}
    for name in ("data_root", "cache", "text_encoder", "clip_model", "region_weights"):
        if given[name] and (name in ("data_root", "cache") or os.path.exists(os.path.expanduser(given[name]))):
            given[name] = os.path.abspath(os.path.expanduser(given[name]))
    return given, options


# ------------------------------------------------------------------------------------------------- retrieve.py


def lengths(text: str) -> list[int]:
    """An option's "10,20,50" -> [10, 20, 50]."""
    if not re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*", text) or 0 in (values := set(map(int, text.split(",")))):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers from 1 on, with commas between them")
    return sorted(values)


def place(text: str) -> Path | str:
    """The folder of a run or an index, or the address of an index in Qdrant."""
    return text if qdrant.is_address(text) else path(text)


def search_parser() -> Parser:
    """The parser of `retrieve.py`: evaluate, index, search, page."""
    out = Parser(prog="retrieve.py", description=ABOUT_SEARCH)
    commands = out.add_subparsers(required=True, dest="command", metavar="evaluate | index | search | page")
    shared = Parser(add_help=False)
    shared.add_argument("--split", choices=("train", "val", "test"),
                        help="which split (default test, val where there is none)")
    shared.add_argument("--data-root", type=path, metavar="DIR", help="folder of the data, if it has moved")
    shared.add_argument("--region-weights", type=not_empty, metavar="FILE",
                        help="weights of the network for regions, if they have moved")
    shared.add_argument("--clip-model", type=not_empty, metavar="FOLDER", help="the CLIP, if it has moved")
    shared.add_argument("--cache", type=path, metavar="DIR", help="folder of computed features, if it has moved")
    shared.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    shared.add_argument("--skip-bad", action="store_true", help="go on without pictures that cannot be read")
    shared.add_argument("--workers", type=whole(0, 256), metavar="N",
                        help="processes that decode pictures (default: one per core, at most 8; 0: no others)")
    one = commands.add_parser("evaluate", parents=[shared], help="recall, both directions",
                              description="Recall of a run: global only, exhaustive local, two-stage; both directions.")
    one.add_argument("run", type=place, metavar="RUN", help="a run folder that train.py wrote, or an index in Qdrant")
    one.add_argument("--from-run", type=path, metavar="RUN", help="run folder of that index, if it has moved")
    one.add_argument("--dtype", choices=DTYPES, default="float32",
                     help="how tokens are stored while searching (default float32)")
    one.add_argument("--shortlist", type=lengths, metavar="K,K,...",
                     help="two-stage recall and time for these lengths of the shortlist, drawn as a picture")
    one.add_argument("--save", type=path, metavar="PICTURE.png", help="that picture's file (default RUN/shortlist.png)")
    two = commands.add_parser("index", parents=[shared], help="encode a split once, to be searched again and again",
                              description="Write an index: all pictures and captions of a split, encoded.")
    two.add_argument("run", type=path, metavar="RUN", help="a run folder that train.py wrote")
    two.add_argument("--out", type=place, metavar="INDEX", required=True,
                     help="the index: a folder; or qdrant://HOST:PORT/NAME or qdrant:FOLDER, see docs/served.md")
    two.add_argument("--approximate", action="store_true", help="let Qdrant find shortlists by HNSW, print its recall")
    two.add_argument("--images", type=path, metavar="FOLDER",
                     help="index the pictures in this folder instead of a split; wants a run trained on pictures")
    two.add_argument("--dtype", choices=DTYPES, default="float16",
                     help="how tokens are stored (default float16)")
    three = commands.add_parser("search", parents=[shared], help="find pictures by a caption, or captions by a picture",
                                description="Search a split or an index with your own words, or with a picture.")
    three.add_argument("run", type=place, metavar="RUN_OR_INDEX", help="a run folder, or an index made of one")
    query = three.add_mutually_exclusive_group(required=True)
    query.add_argument("caption", nargs="?", help="a caption to find pictures for")
    query.add_argument("--queries", type=path, metavar="FILE",
                       help="a file of captions, one on each line; - reads standard input")
    query.add_argument("--image", type=not_empty, metavar="FILE",
                       help="a picture to find captions for: one of the split's, by name or row; or, for a run that "
                       "was trained on pictures or on scenes, any file")
    three.add_argument("--top", type=whole(1, 1_000_000), default=5, metavar="N",
                       help="how many to show (default 5); if these are more than the shortlist, it gets as long")
    three.add_argument("--json", action="store_true", help="one line of JSON per query, for programs")
    three.add_argument("--save", type=path, metavar="PICTURE.png", help="draw what was found, at most 20 pictures")
    three.add_argument("--from-run", type=path, metavar="RUN", help="run folder of the index, if it has moved")
    four = commands.add_parser("page", parents=[shared], help="search in a browser (needs Gradio)",
                               description="Serve a page that searches a split or an index, see docs/page.md.")
    four.add_argument("run", type=place, metavar="RUN_OR_INDEX", help="a run folder, or an index made of one")
    four.add_argument("second", type=place, nargs="?", metavar="SECOND", help="another one, shown beside it")
    four.add_argument("--host", type=not_empty, default="127.0.0.1", metavar="ADDRESS",
                      help="who can open the page: 127.0.0.1, the default, is this machine alone; 0.0.0.0 is everyone "
                      "who can reach it")
    four.add_argument("--port", type=whole(1, 65_535), metavar="N", help="default: the first free one from 7860 on")
    four.add_argument("--from-run", type=path, metavar="RUN", help="run folder of the index, if it has moved")
    return out


def run_search(argv: list[str] | None = None) -> int:
    """The command of `retrieve.py`. Returns its exit code."""
    options = search_parser().parse_args(argv)
    import matplotlib

    from harness import console, page, search  # after the flags, so that --help need not wait for them

    matplotlib.use("Agg")  # figures go into files, also where there is no screen
    commands = {"evaluate": search.run_evaluate, "index": search.run_index, "search": search.run_search,
                "page": page.run_page}
    return console.run_command(lambda: commands[options.command](options) or 0)
