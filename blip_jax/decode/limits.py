"""How long a text may be, said in new tokens, and what the originals' limits mean in them.

`Sampling` and `Beam` count the prompt, or the start id of a model that is given none: `how._replace(**lengths(...))`.
The originals count differently from model to model and from version to version (LAVIS on transformers 4.33.2):

  model, call                   max_length counts             min_length counts
  OPT, caption                  a start id and the end        a start id: 1 forbids nothing
  OPT, answer                   the end (max_new_tokens)      a start id
  T5, caption and answer        the end (max_new_tokens)      a start id
  Q-Former, caption             [DEC] and [SEP]               [DEC]
  Hugging Face 5, any           max_new_tokens: the end       min_new_tokens: neither
"""

from __future__ import annotations


def lengths(prompt: int, least: int, most: int) -> dict[str, int]:
    """min_length and max_length of `Sampling` and `Beam` for texts of `least` to `most` new tokens.

    prompt: its tokens, 1 for a start id alone. The end is one of the `most`, but none of the `least`.
    ValueError: least and most do not fit.
    """
    if not 0 <= least <= most or most < 1:
        raise ValueError(
            f"least={least}, most={most} new tokens: most is 1 or more, and least is 0 to most; change either"
        )
    return {"min_length": prompt + least, "max_length": prompt + most}


def of_lavis(min_length: int, max_length: int, *, start_in_max: bool) -> dict[str, int]:
    """`least` and `most` of `lengths` for LAVIS's limits. start_in_max: whether max_length counts the start id, as of a
    caption of OPT or the Q-Former; a caption of 30 tokens at most then has 29 new ones."""
    return {"least": max(min_length - 1, 0), "most": max_length - start_in_max}
