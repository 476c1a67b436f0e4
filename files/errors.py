"""A user's mistakes and what a user should know, as one base class each."""


class UserError(ValueError):
    """A mistake in what was asked for or brought: one line that names it, what was found and what is allowed.

    An argument is named as in Python, in backticks (`image_encoder`); at the command line it is shown as its flag.
    """


class Notice(UserWarning):
    """Something that was done otherwise than asked for, or that had to be left out; named as in a `UserError`."""
