"""Every error that a user can meet, as one small tree.

    StreamconvError
    ├── UsageError           the call is wrong                          exit code 2
    ├── CheckpointError      a source cannot be read as what it claims  exit code 2
    ├── PlanError            the plan does not check                    exit code 2
    ├── DestinationError     the destination is in the way              exit code 2
    ├── ConversionError      a run failed after it began                exit code 1
    └── VerificationError    the destination is not what the plan says  exit code 1

Each error carries `Problem` records: facts a caller can act on (file, tensor, hint), not only text.
Errors that can come in numbers (`PlanError`, `VerificationError`) carry all of them at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it is, what was expected, what to do next."""

    message: str
    file: str | None = None
    tensor: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        where = "".join(
            (
                f"{self.file}: " if self.file else "",
                f"tensor '{self.tensor}': " if self.tensor else "",
            )
        )
        hint = f" ({self.hint})" if self.hint else ""
        return f"{where}{self.message}{hint}"

    def at(self, file: str | None = None, tensor: str | None = None, hint: str | None = None) -> Problem:
        """The same with a place and a hint, where it has none of its own."""
        return replace(self, file=self.file or file, tensor=self.tensor or tensor, hint=self.hint or hint)


class StreamconvError(Exception):
    """Base of all errors above; `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        tensor: str | None = None,
        hint: str | None = None,
        problems: Iterable[Problem] = (),
    ) -> None:
        self.headline = Problem(message, file=file, tensor=tensor, hint=hint)
        self.problems = tuple(problems) or (self.headline,)
        super().__init__(message)

    def __str__(self) -> str:
        if self.problems == (self.headline,):
            return str(self.headline)
        return "\n".join((str(self.headline), *(f"  - {problem}" for problem in self.problems)))


def listed(items: Iterable[object], most: int = 5) -> str:
    """Names for a message, and how many more there are: `a, b and 3 more`. Shows no control characters."""
    held = items if isinstance(items, Collection) else list(items)
    texts = (text if (text := str(item)).isprintable() else ascii(text)[1:-1] for item in islice(held, most))
    more = f" and {len(held) - most:,} more" if len(held) > most else ""
    return ", ".join(texts) + more


def count(number: int, noun: str) -> str:
    """How many there are of something, for a message: `1 tensor`, `1,234 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortened(problems: Sequence[Problem], most: int = 20) -> list[Problem]:
    """The first problems of many, and how many more there are."""
    more = [Problem(f"and {len(problems) - most:,} more")] if len(problems) > most else []
    return [*problems[:most], *more]


def a(noun: str) -> str:
    """A noun with its article: `a Llama`, `an OLMoE`."""
    return f"{'an' if noun[:1].upper() in 'AEIO' else 'a'} {noun}"


class UsageError(StreamconvError):
    """The call is wrong: an unknown option value, a path that does not exist."""

    exit_code = 2


@contextmanager
def about(what: str) -> Iterator[None]:
    """Say what a wrong call is wrong about, before what is wrong with it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{what}: {error.headline.message}", hint=error.headline.hint) from None


class CheckpointError(StreamconvError):
    """A source file is damaged, hostile, or not what it claims to be."""

    exit_code = 2


class PlanError(StreamconvError):
    """The plan does not check; nothing was written. Holds every problem found."""

    exit_code = 2


@contextmanager
def located(file: str | None = None, tensor: str | None = None, hint: str | None = None) -> Iterator[None]:
    """Say of errors raised inside where they are and what to do, as far as they do not say it themselves."""
    try:
        yield
    except CheckpointError as error:
        error.headline = error.headline.at(file, tensor, hint)
        error.problems = tuple(problem.at(file, tensor, hint) for problem in error.problems)
        raise


class Problems(list[Problem]):
    """What is wrong with several things, each of which is looked at, so that all of it is reported at once."""

    @contextmanager
    def collecting(self, file: str | None = None, tensor: str | None = None) -> Iterator[None]:
        """Keep the problems of an error raised inside, which goes no further; see `located`."""
        try:
            with located(file, tensor):
                yield
        except StreamconvError as error:
            self.extend(error.problems)

    def report(self, message: str, *, file: str | None = None, hint: str | None = None) -> None:
        """Raise a CheckpointError with all of them, where there are any."""
        if self:
            raise CheckpointError(message, file=file, hint=hint, problems=self)


class DestinationError(StreamconvError):
    """The destination holds something that this run must not touch."""

    exit_code = 2


class ConversionError(StreamconvError):
    """A run failed after it began; its finished work is kept and the run can be resumed."""


class VerificationError(StreamconvError):
    """The destination differs from what the plan says."""
