"""Forms of the Triton engine for exact tiles, and their names in results. Imports nothing."""

FORMS = ("pointer", "tma", "ws")

AUTO = "pointer"
"""What `kernel.form: auto` runs."""


def way(form: str) -> str:
    """A form beside other engines, which go by their own names."""
    return f"triton-{form}"
