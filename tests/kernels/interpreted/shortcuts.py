"""What Triton's interpreter does for every call of a function is done once."""

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

# mypy: disable-error-code="attr-defined"


def take_shortcuts() -> None:
    """For the rest of the process the language is the interpreter's, and its types are known."""
    of_any_kernel = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(of_any_kernel)
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
    interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype)


def _remembering(numpy_type: Any) -> Any:
    """The NumPy type of a type or of a block of them, looked up once for each."""
    found: dict[str, Any] = {}

    def remembered(of: Any) -> Any:
        name = of.scalar.name
        if name not in found:
            found[name] = numpy_type(of.scalar)
        return found[name]

    return remembered
