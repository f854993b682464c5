"""The one error that is the user's to mend."""


class InputError(Exception):
    """Bad input: the message names the file, key or sample, what was found and what to do.

    Entry points print it as one line and exit with code 2; it never needs a traceback.
    """
