"""The one exception for what the user can put right: bad settings, bad input, a missing file."""


class DynarouteError(Exception):
    """Something the user can fix. Its message is one line that names the file or key, the value and what is right.

    Command-line entry points print the message without a traceback (`dynaroute.pipeline.stage.run`).
    """
