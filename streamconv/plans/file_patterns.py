"""Regular expressions out of a file, which somebody else wrote: tried where they come to an end soon."""

from __future__ import annotations

import re

from streamconv.errors import PlanError

# A group that repeats may take forever to match.
_LONGEST = 256
_SLOW = re.compile(r"[)\]][*+?{]|[*+?}][*+?{]")


def matches(pattern: str, name: str, of: str, *, form: str = "{}") -> bool:
    """Whether a pattern matches from the start of a name.

    `of`: the file that it is of, for messages. `form`: what is put around it, once it is known to be one.

    Raises:
        PlanError: it may take forever, or is no regular expression.
    """
    if len(pattern) > _LONGEST or _SLOW.search(pattern):
        raise PlanError(
            f"the pattern '{pattern[:60]}' of {of} repeats a group, or is long: it may take forever, and is not followed",
            tensor=name,
        )
    try:
        return re.match(form.format(pattern), name) is not None
    except re.error as error:
        raise PlanError(
            f"the pattern '{pattern}' of {of} is not a regular expression: {error}", tensor=name
        ) from None
