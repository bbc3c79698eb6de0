"""The tables: numbered steps, each one SQL file for both engines. Never change a step after its release: add one."""

from importlib.resources import files


def steps() -> list[list[str]]:
    """Return the steps in their order, each as its statements."""
    texts = [step for step in files(__name__).iterdir() if step.name.endswith(".sql")]
    return [
        [statement for statement in step.read_text(encoding="utf-8").split(";\n") if statement.strip()]
        for step in sorted(texts, key=lambda step: step.name)
    ]
