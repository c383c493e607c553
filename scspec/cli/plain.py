"""How all of the command line looks: plain text, also in help; no completion that installs itself."""

from typing import Any

PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
