"""What `--print-config` prints: the settings in force and where each comes from, as a TOML file.

What is printed can be given to `--config`: comments say where a value came from, and hold what a file can't
(the tokens, which are counted and never shown, and the path of the file itself).
"""

from __future__ import annotations

import json

from keypool.config.settings import OPTIONS, Option, Settings
from keypool.config.tokens import ROLES, token_variables
from keypool.engine.valkey.url import without_password

FLAG = "--print-config"


def in_force(settings: Settings) -> str:
    """The text, without a line break at its end."""
    lines = ["# keypool: the settings in force, and where each comes from"]
    width = max(len(_assignment(option, settings)) for option in OPTIONS)
    lines += [f"{_assignment(option, settings):{width}}  # {_source(option, settings)}" for option in OPTIONS]
    for role in ROLES:
        count = len(getattr(settings, f"{role}_tokens"))
        where = " or ".join(token_variables(role))
        lines.append(
            f"# tokens of the role {role}: {count or 'none'} from {where}{', not shown' if count else ''}"
        )
    if settings.open:
        lines.append("# no token: open to whoever reaches it, on loopback only")
    return "\n".join(lines)


def _assignment(option: Option, settings: Settings) -> str:
    value = getattr(settings, option.name)
    if option.name == "engine":
        value = without_password(value)
    if value is None:  # TOML has no word for it
        return f"# {option.name} = none"
    # JSON's strings and numbers are TOML's too.
    assignment = f"{option.name} = {json.dumps(value, ensure_ascii=False)}"
    return f"# {assignment}" if option.name == "config" else assignment


def _source(option: Option, settings: Settings) -> str:
    names = {
        "default": "default",
        "toml": f"config file {settings.config}",
        "environment": option.variable,
        "flag": option.flag,
    }
    return names[settings.origins[option.name]]
