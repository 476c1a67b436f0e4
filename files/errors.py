"""A user's mistakes and what a user should know, as one base class each; what libraries raise becomes the first."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what was asked for or brought: one line that names it, what was found and what is allowed.

    An argument is named as in Python, in backticks (`image_encoder`); at the command line it is shown as its flag.
    """

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().splitlines()))


# Control characters, also those of lines and of the direction of writing.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
LONGEST = 2000  # characters of a message


def printable(message: str) -> str:
    """Names out of files stand in messages: a line break or an escape sequence in one must not act on the screen."""
    message = UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), message)
    return message if len(message) <= LONGEST else f"{message[:LONGEST]}..."


def brief(text: str, most: int = 200) -> str:
    """Both ends of a long text."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


class Notice(UserWarning):
    """Something that was done otherwise than asked for, or that had to be left out; named as in a `UserError`."""


class WeightsError(UserError):
    """A weight file that cannot be used; the message names the file, what was found and what is wanted."""


@contextmanager
def untrusted(kind: type[UserError], message: str) -> Iterator[None]:
    """Stands around a library that is given bytes which may be anything: all that it raises on them is `kind`.

    No list of exceptions would do: a damaged header makes NumPy raise a TokenError of the Python tokenizer, and torch's
    unpickler fail an assertion. Nothing of ours belongs inside, or its faults would pass for the file's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001, see above
        raise kind(f"{message} ({reason(error)})") from None


def reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__
