"""What all stage scripts share: `--help` from the docstring, validated settings, errors in one line."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from dynaroute.config import load_settings
from dynaroute.errors import DynarouteError


def run(main: Callable[..., None], doc: str, *arguments: str) -> None:
    """Parses the command line, loads params.yaml and calls `main(settings, *values of the positional arguments)`.

    Ends the process with status 1 and one line on stderr when the user can put the mistake right.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in arguments:
        parser.add_argument(name)
    values = vars(parser.parse_args()).values()
    try:
        main(load_settings(), *values)
    except DynarouteError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
