"""Forms of the one launch that are being tried: each letter is a change, and "" is what runs.

s   tokens are dealt out to the CTAs in turns, so that few tokens leave no scheduler two routing warps
q   a token in doubt has a second look at exact logits of the K + 1 greatest, ahead of whole keys
r   the range of fixed point is -32 to 32, its unit a quarter
b   routing and aligning warps part ahead of the logits' loads, and each waits for the cluster by itself
p   a message is sent by a predicated instruction, without a branch around it
l   with b: logits are asked for ahead of the mailbox's opening and of the warps' parting
h   words of a mailbox are counted in two halves; bits of the first are set while the second is awaited
"""

LETTERS = "sqrbplh"
_chosen: set[str] = set()


def set_form(letters: str) -> None:
    """Chooses the form for all that is built from here on.

    Raises:
        ValueError: a letter is none of `LETTERS`.
    """
    letters = letters.replace("-", "")
    if unknown := set(letters) - set(LETTERS):
        raise ValueError(f"no such form: {''.join(sorted(unknown))}")
    _chosen.clear()
    _chosen.update(letters)


def has(letter: str) -> bool:
    """Whether the form that was chosen has the change."""
    return letter in _chosen
