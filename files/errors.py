"""The one base of all mistakes that a user can make."""


class UserError(ValueError):
    """A mistake in what was asked for or brought; the message is one line that names it, what was found and what is allowed."""
