"""The ways to split a model over cards of one kind, the fewest cards first."""

from placement.kinds import CardKind
from placement.requests import Request

# Every stage more lets a request wait once more at every token.
MOST_STAGES = 8
ON_ONE_CARD = frozenset({"transformers", "fake"})


def splits(request: Request, kind: CardKind) -> list[tuple[int, int]]:
    """Tensor x pipeline degrees, the fewest cards first.

    A tensor-parallel group stays on one node. Stages come when the largest such group is too small,
    and only they cross nodes.
    """
    wishes = request.wishes
    if wishes.gpu_fraction is not None and wishes.gpu_fraction < 1:
        return [(wishes.tensor_parallel_size or 1, wishes.pipeline_parallel_size or 1)]
    most = min(kind.total, request.max_gpus or kind.total)
    if kind.is_slice or request.engine in ON_ONE_CARD:
        most = 1
    if wishes.tensor_parallel_size is not None:
        degrees = [wishes.tensor_parallel_size]
    else:
        powers = [1 << exponent for exponent in range(10)]
        degrees = [
            degree
            for degree in sorted({*powers, kind.most_on_a_node})
            if degree <= min(kind.most_on_a_node, most)
            and (degree == 1 or not request.shape.split_problem(degree))
        ]
    if wishes.pipeline_parallel_size is not None:
        return [
            (degree, wishes.pipeline_parallel_size)
            for degree in degrees
            if degree * wishes.pipeline_parallel_size <= most
            or wishes.tensor_parallel_size is not None
        ]
    found = [(degree, 1) for degree in degrees]
    if wishes.tensor_parallel_size is None and request.engine not in ON_ONE_CARD:
        widest = degrees[-1]
        stages = min(most // widest, request.shape.num_layers, MOST_STAGES)
        found += [(widest, number) for number in range(2, stages + 1)]
    return found
