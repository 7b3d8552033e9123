"""Why a case could not be predicted, in one line, and which errors end a prediction."""

import os
from pathlib import Path

import torch

from nnunetv2_diffusion.inference.inputs import CaseError
from nnunetv2_diffusion.out_of_memory import is_out_of_memory

OF_ONE_CASE = (CaseError, ValueError, ArithmeticError, MemoryError, OSError, torch.cuda.OutOfMemoryError)


def reason_of(error: BaseException, work: Path | None = None) -> str:
    """One line for a person: what went wrong, and what helps where that is known.

    Args:
        error: that ended a case, or the prediction.
        work: folder that the case was made in, which is gone by now: files are named as they lie in it.
    """
    said = _reason(error)
    return said if work is None else said.replace(f"{work}{os.sep}", "")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        on_gpu = isinstance(error, torch.cuda.OutOfMemoryError) or "cuda" in text.lower()
        return (
            "the GPU has not enough memory; -device cpu is slower and has more"
            if on_gpu
            else f"not enough main memory ({text or 'MemoryError'}); -npp 0 -nps 0 needs less"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, CaseError | OSError | ValueError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}"


def concerns_one_case(error: Exception) -> bool:
    """Whether the next case may do better; anything unknown is taken for a fault of the model or the machine."""
    return isinstance(error, OF_ONE_CASE) or is_out_of_memory(error)
