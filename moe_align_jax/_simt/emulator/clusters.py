"""What the CTAs of a cluster send to each other, in NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np

from moe_align_jax._simt.emulator.faults import (
    DivergentBarrier,
    MisalignedAccess,
    OutOfBounds,
    RaceError,
    Undefined,
)
from moe_align_jax._simt.emulator.memory import Buffer
from moe_align_jax._simt.emulator.values import Scope, array_of
from moe_align_jax._simt.language import WARP, Int, Kernel, Simt


class InCluster(Simt):
    """The part of the machine that knows mailboxes."""

    name: str
    scope: Scope
    _cta: np.ndarray
    _whole: Callable[[int, str], Any]
    _full: Callable[[np.ndarray], np.ndarray]
    _stored: Callable[[Int | int], np.ndarray]

    def _open_mailboxes(self, kernel: Kernel) -> None:
        """Makes the mailbox of each CTA, of which nothing has come yet."""
        words = kernel.mailbox
        self._mailbox = Buffer(
            "the mailbox",
            (words,),
            np.zeros(words * kernel.num_ctas, np.int32),
            kernel=kernel.name,
            num_threads=kernel.num_threads,
            writable=False,
            per_cta=True,
            reach="cta",
            check_races=False,
        )
        self._posted = np.zeros((kernel.num_ctas, words), bool)
        self._body_opens, self._opened = kernel.opens_mailbox, not kernel.opens_mailbox
        self._ready = np.zeros(kernel.num_ctas * kernel.num_threads, bool)
        self._fetched = False

    def open_mailbox(self) -> None:
        if self.scope.lanes is not None:
            raise DivergentBarrier(f"{self.name}: open_mailbox is for all threads.")
        if not self._body_opens or self._opened:
            raise Undefined(f"{self.name}: open_mailbox is for kernels that say so, once.")
        self._opened = True

    def cluster_ready(self, *, has_first: bool = True) -> None:
        self._whole(WARP, "cluster_ready")
        if not self._opened:
            raise Undefined(f"{self.name}: cluster_ready before open_mailbox.")
        if self._are_ready().any():
            raise Undefined(f"{self.name}: a warp comes to cluster_ready once.")
        if not has_first and (self.scope.active(self._full(array_of(self.thread_id()))) == 0).any():
            raise Undefined(f"{self.name}: cluster_ready has the first thread, against has_first.")
        self._ready[slice(None) if self.scope.lanes is None else self.scope.lanes] = True

    def _are_ready(self) -> np.ndarray:
        """Of the active threads, which have come to `cluster_ready`."""
        return self.scope.active(self._ready)

    def post(self, cta: Int | int, index: Int | int, *values: Int | int) -> None:
        width = len(values)
        if width not in (1, 4):
            raise Undefined(f"{self.name}: post puts 1 word or 4; got {width}.")
        if not self._are_ready().all():
            raise RaceError(f"{self.name}: post before cluster_ready: that CTA may not run yet.")
        to, at = (self.scope.active(self._full(array_of(x))) for x in (cta, index))
        words = [self._stored(value) for value in values]
        if (to // self.cluster != self.scope.active(self._full(self._cta)) // self.cluster).any():
            raise OutOfBounds(f"{self.name}: post to another cluster.")
        outside = (at < 0) | (at + width > self._mailbox.words)
        if outside.any():
            raise OutOfBounds(f"{self.name}: post into word {at[outside.argmax()]} of a mailbox.")
        if (at % width).any():
            raise MisalignedAccess(
                f"{self.name}: post of {width} words must be aligned to as many."
            )
        cells = (to.astype(np.intp) * self._mailbox.words + at)[:, None] + np.arange(width)
        posted = self._posted.reshape(-1)
        if posted[cells].any() or np.unique(cells).size < cells.size:
            raise RaceError(f"{self.name}: a word of a mailbox is posted once.")
        posted[cells] = True
        for k, word in enumerate(words):
            self._mailbox.data[cells[:, k]] = word

    def mail(self) -> Buffer:
        self._whole(WARP, "mail")
        if not self._are_ready().all():
            raise RaceError(f"{self.name}: mail before cluster_ready: there may be no mailbox yet.")
        waiting = np.unique(self.scope.active(self._full(self._cta)))
        if not self._posted[waiting].all():
            raise DivergentBarrier(f"{self.name}: mail waits for a word that nobody posts.")
        self._fetched = True
        return self._mailbox

    def _check_mail_end(self) -> None:
        """A CTA's mailbox is gone as soon as the CTA ends."""
        if self._posted.size and not self._ready.all():
            raise DivergentBarrier(f"{self.name}: a warp ends without cluster_ready.")
        if self._posted.size and not self._fetched:
            raise RaceError(f"{self.name}: it ends without mail: a word may still be on its way.")
