"""Make tutorial.ipynb from TUTORIAL.md, or run it from top to bottom as a reader would.

    python .ci/notebook.py          # writes tutorial.ipynb, without outputs
    python .ci/notebook.py --run    # runs it in a copy of this folder; needs pip install nbclient ipykernel

Examples (blocks of Python that import something or say "# continues") and commands (blocks of sh) become cells of code,
in their order, and the rest becomes text. Pictures go to runs/, which git ignores; the cell that draws one (by its
comment, "draws pictures/walk.png") also shows it.
"""
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUP = """\
import sys

if "google.colab" in sys.modules:       # elsewhere, start Jupyter in the project's folder
    address = input("Address of the project's git repository: ")
    !git clone --quiet --depth 1 {address} project
    %cd project
    %pip install --quiet -r requirements.txt"""


def cell(kind, text):
    more = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, **more, "source": text.strip("\n").splitlines(keepends=True)}


def code_of(language, block):
    """The code of a cell for a block; "" for a quotation, which is none."""
    if language == "sh":
        return re.sub(r"^python (.*?) *(#.*)?$", r"%run \1", block, flags=re.M)         # runs a script in a notebook
    if "import " not in block and "# continues" not in block:
        return ""
    block = block.replace("pictures/", "runs/")
    drawn = re.search(r"# .*draws (runs/\w+\.\w+)", block)
    return block + (f'\nfrom IPython.display import Image\nImage("{drawn[1]}")' if drawn else "")


def notebook(page):
    """The text of TUTORIAL.md -> the text of tutorial.ipynb."""
    page = re.sub(r"^!\[.*\n\n", "", page, flags=re.M)                                  # its cells show the pictures,
    page = re.sub(r"^```\n\n```text\n.*?^```$", "```", page, flags=re.M | re.S)         # and print what they print
    text, *parts = re.split(r"^```(python|sh)\n(.*?)^```$", page, flags=re.M | re.S)
    cells = [cell("code", SETUP)]
    for language, block, after in zip(parts[::3], parts[1::3], parts[2::3]):
        if code := code_of(language, block):
            cells += [cell("markdown", text), cell("code", code)]
            text = after
        else:
            text += f"```{language}\n{block}```{after}"
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": [*cells, cell("markdown", text)], "metadata": about, "nbformat": 4,
                       "nbformat_minor": 4}, indent=1, ensure_ascii=False) + "\n"


def run():
    """Run the notebook in a fresh process -> runs/tutorial.ipynb, with outputs. Raises where a cell fails."""
    import nbclient
    import nbformat
    page = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", "data", ".git"))
        nbclient.NotebookClient(page, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    (ROOT / "runs").mkdir(exist_ok=True)
    nbformat.write(page, ROOT / "runs" / "tutorial.ipynb")


if __name__ == "__main__":
    if sys.argv[1:] == ["--run"]:
        run()
    else:
        (ROOT / "tutorial.ipynb").write_text(notebook((ROOT / "TUTORIAL.md").read_text()))
