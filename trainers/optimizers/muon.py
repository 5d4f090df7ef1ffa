"""torch's Muon for the matrices that it takes and AdamW for the rest, as one optimizer."""

from collections.abc import Iterable

import torch


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `use_muon=True` are stepped by `torch.optim.Muon` (2-D weights only), the others by AdamW.

    One set of groups and one state, so that schedulers and checkpoints see one optimizer. Muon's updates are scaled to
    the size of AdamW's (`match_rms_adamw`), so that one learning rate serves both.

    Args:
        params: parameter groups, each with `use_muon`.
        lr, weight_decay: of both; `betas`, `eps`: of AdamW; `momentum`: of Muon.

    Raises `ValueError` for groups without `use_muon`, and what torch's classes raise.
    """

    def __init__(
        self,
        params: Iterable[dict],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ):
        groups = list(params)
        if not all(isinstance(group, dict) and "use_muon" in group for group in groups):
            raise ValueError("MuonAdamW needs parameter groups (dicts) that each say use_muon=True or False.")
        shared = {"lr": lr, "weight_decay": weight_decay}
        self._options = {
            True: {**shared, "momentum": momentum, "adjust_lr_fn": "match_rms_adamw"},
            False: {**shared, "betas": betas, "eps": eps},
        }
        super().__init__(groups, shared)
        self._engines = {}
        for use_muon, kind in ((True, torch.optim.Muon), (False, torch.optim.AdamW)):
            if mine := [group for group in self.param_groups if group["use_muon"] == use_muon]:
                # It fills in the options that a group does not have.
                self._engines[use_muon] = kind(mine, **self._options[use_muon])

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for use_muon, engine in self._engines.items():
            # Loading a state_dict replaces both.
            engine.param_groups = [group for group in self.param_groups if group["use_muon"] == use_muon]
            engine.state = self.state
            engine.step()
        return loss


__all__ = ["MuonAdamW"]
