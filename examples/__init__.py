from importlib.util import find_spec

_missing = [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]
if _missing:
    raise ImportError(f"the examples need {', '.join(_missing)}, not installed; run pip install -e '.[examples]'")
