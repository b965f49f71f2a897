"""Mistakes in the inputs of a config, all of which are told at once."""

from contextlib import AbstractContextManager


class Mistakes(AbstractContextManager["Mistakes"]):
    """Collects the messages of the ValueErrors that are raised in its blocks, each message once."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, ValueError):
            return False
        self.found[str(error)] = None
        return True

    def require_none(self) -> None:
        """Raise one ValueError with all messages, if there are any."""
        if len(self.found) == 1:
            raise ValueError(next(iter(self.found)))
        if self.found:
            lines = [f"{number}. {text}" for number, text in enumerate(self.found, start=1)]
            raise ValueError("\n".join([f"the config has {len(lines)} mistakes:", *lines]))
