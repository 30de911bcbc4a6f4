"""An outer algorithm of one's own: SlowMo whose momentum does not know the learning rate, as in BMUF (Chen & Huo 2016)."""

from slowmo.outer import SlowMo


class BlockMomentum(SlowMo):
    """u <- β u + (x0 - x), x0 <- x0 - α u. The same as SlowMo while the learning rate stays the same."""

    divides_by_lr = False  # so a slow step at learning rate 0 is one as any

    def _update(self, x0, u, x, lr):
        """Lines 7 and 8 for one segment, in place. x0, u: `[1, d]`; x: the exact average; lr: γ of the last inner step."""
        u.mul_(self.beta).add_(x0 - x)
        x0.sub_(u, alpha=self.alpha)
