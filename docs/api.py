"""python docs/api.py: writes api.md from the docstrings; --check only compares."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import reparam_kernels as rk

PAGE = Path(__file__).parent / "api.md"


def entries(module: ModuleType, name: str) -> Iterator[tuple[str, Any]]:
    for key in module.__all__:
        thing = getattr(module, key)
        if isinstance(thing, ModuleType):
            if thing is not rk.reference:  # the same functions
                yield f"{name}.{key}", thing
                yield from entries(thing, f"{name}.{key}")
        elif callable(thing):
            yield f"{name}.{key}", thing


def signature(thing: Any) -> str:
    return str(inspect.signature(thing)).replace("torch._C.", "torch.")


def page() -> str:
    out = ["# API\n", "Written from the docstrings by `python docs/api.py`; `import reparam_kernels as rk`.\n"]
    for name, thing in entries(rk, "rk"):
        text = inspect.getdoc(thing) or ""
        if isinstance(thing, ModuleType):
            out += [f"## {name}\n", text + "\n"]
            continue
        out += [f"### {name}\n", f"```text\n{name.rpartition('.')[2]}{signature(thing)}\n\n{text}\n```\n"]
        if inspect.isclass(thing):
            for key, member in vars(thing).items():
                if isinstance(member, property) and member.__doc__:
                    out.append(f"- `.{key}`: {inspect.getdoc(member)}")
                    continue
                member = inspect.unwrap(getattr(member, "__func__", member))
                if not key.startswith("_") and inspect.isfunction(member) and member.__doc__:
                    out.append(f"- `.{key}{signature(member)}`: {inspect.getdoc(member)}")
            out.append("")
    return "\n".join(out)


def main() -> None:
    if "--check" in sys.argv:
        sys.exit("api.md is stale: python docs/api.py" if PAGE.read_text() != page() else 0)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
