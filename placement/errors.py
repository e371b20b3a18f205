"""What the placement says no with, beside `vram.errors`."""

from vram.errors import Invalid


class NoRoom(Invalid):
    """It would fit on these cards, and too few of them are free together.

    `most` is how many one node has free, or of stages how many all nodes have.
    """

    def __init__(
        self, model: str, num_gpus: int, stages: int, share: float, card: str, most: int
    ) -> None:
        super().__init__(model, "gpus")
        self.args = (model, num_gpus, stages, share, card, most)
        self.model = model
        self.num_gpus = num_gpus
        self.stages = stages
        self.share = share
        self.card = card
        self.most = most

    def __str__(self) -> str:
        what = f"{self.num_gpus} x {self.card}"
        if self.share < 1:
            what = f"{self.share:g} of one {self.card}"
        left = f"{self.most} {'is' if self.most == 1 else 'are'} left"
        if self.stages > 1:
            left = f"room for {self.most} of its {self.stages} stages is left"
        elif self.num_gpus > 1:
            what, left = f"{what} on one node", f"{left} there"
        return (
            f"{self.model} needs {what}, and {left} beside the other models: add cards, lower "
            "num_replicas, or let small models share a card (objective: cheapest)"
        )
