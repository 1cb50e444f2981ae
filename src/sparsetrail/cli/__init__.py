"""The command line: verbs are loaded when called, so that help does not wait for torch. Exit codes in `main`."""

import errno
import sys
from collections.abc import Sequence
from keyword import iskeyword

from cyclopts import App, CycloptsError

from sparsetrail import __version__

HOMES = {
    "attack": "sparsetrail.cli.attacks",
    "audit": "sparsetrail.cli.attacks",
    "train": "sparsetrail.cli.train",
    "defend": "sparsetrail.cli.train",
    "import": "sparsetrail.cli.train",
    "trail": "sparsetrail.cli.trails",
    "ablate": "sparsetrail.cli.trails",
    "design": "sparsetrail.cli.design",
}
HOME = "sparsetrail.cli.verbs"  # of all others
SETS = "sparsetrail.cli.sets"
THEORY = "sparsetrail.cli.theory"
VERBS = {
    "quick": "Train two small SEW-ResNets on shipped images, attack both, trace both: a report in minutes.",
    "train": "Train a network, or continue; Ctrl-C and kill -9 lose nothing.",
    "defend": "Train a system the paper compares with (SNN-RAT, HIRE-SNN, ...) or a standard defence.",
    "import": "Take in a foreign PyTorch checkpoint of a known architecture; tensors only, nothing is run.",
    "attack": "Attack a trained model: one attack, one threat, one line.",
    "audit": "Judge a robustness claim: checks, a battery of attacks, worst case per image, verdict.",
    "trail": "Zeros in and norm of the gradient at every operation of a model, and which operations create them.",
    "ablate": "What is left of the zeros of models when parts of their backward are replaced.",
    "design": "Pools, surrogates, time steps, stems: clean accuracy against the worst case, as a plot.",
    "reproduce": "Run a table or figure of the paper again, ours beside the published.",
    "report": "Draw the report of a finished run again: HTML, Markdown, table.",
    "bench": "Measure the engine against SpikingJelly 2.0.0, in a clone: a table and CSVs.",
    "doctor": "What this machine offers: torch, device, threads, data, optional tools.",
}
ANEW = ("attack", "theory", "data", "import", "report", "bench", "doctor")  # these keep no unfinished work
DATA_VERBS = {
    "get": "Download an image set (the only verb that touches the network).",
    "add": "Take in an image set from a local file or folder.",
    "verify": "Check every set in the cache against its content hash.",
    "list": "Sets in the cache and the one that is shipped.",
}
THEORY_VERBS = {
    "demo": "The paper's theorems on closed forms, counterexamples and two small networks; no model, no data.",
    "audit": "The paper's theorems on one victim: hypotheses, what was measured, a verdict for each.",
}


def app(asked: Sequence[str] = ()) -> App:
    """The command tree; a verb that is `asked` for is loaded anyway and shows its own docstring for help."""

    def line(verb: str, text: str) -> str | None:
        return None if verb in asked else text

    root = App(
        name="sparsetrail",
        version=__version__,
        help="Adversarial robustness of spiking neural networks, judged honestly.",
        suppress_keyboard_interrupt=False,  # `main` says what becomes of the work
    )
    for verb, text in VERBS.items():
        root.command(f"{HOMES.get(verb, HOME)}:{verb}{'_' * iskeyword(verb)}", name=verb, help=line(verb, text))
    data = App(name="data", help="Image sets: get, add, verify, list.")
    for verb, text in DATA_VERBS.items():
        data.command(f"{SETS}:data_{verb}", name=verb, help=line(verb, text))
    root.command(data)
    theory = App(name="theory", help="The paper's theorems, put to the test: demo, audit.")
    for verb, text in THEORY_VERBS.items():
        theory.command(f"{THEORY}:{verb}", name=verb, help=line(verb, text))
    root.command(theory)
    return root


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 our bug or failed training, 2 usage, 4 input refused, 130 interrupted."""
    asked = sys.argv[1:] if argv is None else argv
    try:
        app(asked)(argv, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        sys.exit(2)
    except KeyboardInterrupt:
        goes_on = "begins anew" if asked[0] in ANEW else "continues"
        print(f"interrupted; the same command {goes_on}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        code = exit_code(error)
        if code == 1 and type(error).__name__ != "TrainingFailed":
            raise
        print(f"sparsetrail: {error}", file=sys.stderr)
        sys.exit(code)


def exit_code(error: Exception) -> int:
    """Refused input, or no room to write, is 4, an orderly stop is 130, anything else is a bug of ours (1)."""
    if type(error).__name__ == "TrainingStopped":
        return 130
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return 4 if full or isinstance(error, ValueError | PermissionError) else 1
