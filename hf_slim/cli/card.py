"""`hf-slim card`: the model card of a slim model, written anew from its folder."""

from __future__ import annotations

from ..saving import renew_card


def card(folder: str) -> str:
    """Write the model card of a slim model, in place of one that hf_slim wrote; what somebody else wrote stays.

    Args:
        folder: A folder that `save_slimmed` wrote.

    Returns:
        Where the card lies.

    Raises:
        ValueError: If the folder holds no slim model.
    """
    return f"The model card lies in {renew_card(folder)}"
