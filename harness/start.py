"""What both programs do first, before the imports that take seconds. Nothing is imported here that is not needed."""
import signal
import sys


def first_look(program: str) -> None:
    """End the program here for --help, a mistake in a flag, and data that is neither here nor within reach.

    From now on Ctrl-C ends it too, without a traceback out of an import, until `console.run_command` takes over.
    program: "train" or "retrieve".
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a shell script's program in the background ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from harness import flags

    if program == "retrieve":
        flags.search_parser().parse_args()
        return
    given, options = flags.parse()
    from harness import console, fetching

    if code := console.run_command(lambda: fetching.first_look(given, options)):
        sys.exit(code)
