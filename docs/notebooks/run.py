"""Runs the notebooks beside this file and keeps what they print and draw: python docs/notebooks/run.py [NAME.ipynb ...]

Nothing of Jupyter is needed: the code cells of a notebook are executed one after another in one namespace.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def execute(notebook: dict[str, Any]) -> None:
    """Runs the code cells; their outputs are replaced by what they print and by what their last line shows."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed, shown = io.StringIO(), None
        with redirect_stdout(printed):
            exec(compile(tree, "cell", "exec"), names)
            if isinstance(last, ast.Expr):
                shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        cell["execution_count"] = number + 1
        cell["outputs"] = _outputs(printed.getvalue(), shown, number + 1)


def _outputs(text: str, shown: Any, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if text:
        found.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if hasattr(shown, "savefig"):
        held = io.BytesIO()
        shown.savefig(held, format="png", metadata={"Software": None})
        data = {"image/png": base64.b64encode(held.getvalue()).decode(), "text/plain": ["<Figure>"]}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    elif shown is not None:
        data = {"text/plain": repr(shown).splitlines(keepends=True)}
        found.append({"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": count})
    return found


if __name__ == "__main__":
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        execute(notebook)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)
