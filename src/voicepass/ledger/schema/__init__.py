"""The tables: numbered steps, each one SQL file for both engines. Never change a step after its release: add one."""

from importlib.resources import files


def steps() -> list[list[str]]:
    """Return the steps in their order, each as its statements."""
    found = {step.name: step for step in files(__name__).iterdir() if step.name.endswith(".sql")}
    texts = [step.read_text(encoding="utf-8") for _, step in sorted(found.items())]
    return [[statement for statement in text.split(";\n") if statement.strip()] for text in texts]
