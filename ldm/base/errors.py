"""The one error that is the user's to mend."""


class InputError(Exception):
    """Names the file, key or sample, what was found and what to do. Entry points print it as one line and exit with code 2."""
