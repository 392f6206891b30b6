"""Log-probabilities of a drawn token and of the most likely ones, in plain torch: the definition that the kernel is
checked against."""

from torch import Tensor


def logprobs_ref(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of given tokens and of the k most likely, under the softmax of ``logits``.

    Shapes: logits [R, V] floating point, token_ids [R] -> chosen [R] float32, top values [R, k] float32 in descending
    order, top ids [R, k].
    """
    logits = logits.float()
    normalizer = logits.logsumexp(dim=1, keepdim=True)
    chosen = (logits.gather(1, token_ids[:, None]) - normalizer)[:, 0]
    top = logits.topk(k, dim=1)
    return chosen, top.values - normalizer, top.indices
