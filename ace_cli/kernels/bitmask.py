"""Matrices with many zeros as a bit mask and the values that are not zero, exactly.

Of a bfloat16 matrix with half of its weights zero 0.5625 of the bytes are left. A CPU that decodes one token at a time
waits for weights, so it gains as much: ``product`` reads the packed form. Of weights that are codes of 8 bits times a
scale the codes are kept. O outputs, I inputs, T tokens, G groups of a row that share a scale.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy
import torch
from torch import Tensor

from ace_cli.kernels import native

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
#: Bytes that follow the last value, rounded up to as many: whole vectors are read.
ROOM = 64
#: Rows that a thread takes at once.
_CHUNK = 32
#: By how many bits the number of 16 columns is shifted to that of its scale, where a row has one.
_ALL = 62


@dataclass(frozen=True)
class Bitmask:
    """A matrix (O, I). What is stored as 0 bits is left out; -0.0 is a value.

    ``mask`` is uint8 (O, 8 ceil(I / 64)): bit b of byte k of a row stands for column 8 k + b. ``values`` are those of
    row 0, then row 1, ...; then room. ``starts`` (O,) is where each row begins in them.

    With ``scales``, bfloat16 (O, G), values are codes, int8: a weight is code * scale, rounded to ``rounded_to``.
    """

    shape: tuple[int, int]
    mask: Tensor
    values: Tensor
    starts: Tensor
    scales: Tensor | None = None
    rounded_to: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.rounded_to or self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        parts = (self.mask, self.values, self.starts, self.scales)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def compiled(self) -> bool:
        """Whether the compiled code knows such groups: a row, or a power of two of columns from 16 on."""
        groups = 1 if self.scales is None else self.scales.shape[1]
        width = self.shape[1] // groups
        return groups == 1 or (width >= 16 and not width & (width - 1))

    def rows(self, first: int, last: int) -> Bitmask:
        """Some of its rows, in the same memory."""
        shape = (min(last, self.shape[0]) - first, self.shape[1])
        scales = None if self.scales is None else self.scales[first:last]
        return replace(self, shape=shape, mask=self.mask[first:last], starts=self.starts[first:last], scales=scales)


def packed_bytes(shape: Sequence[int], nonzeros: int, width: int) -> int:
    """Bytes of mask and values of a matrix (O, I) whose elements, or codes, take ``width`` bytes."""
    rows, columns = shape
    return rows * 8 * -(-columns // 64) + _with_room(nonzeros, width) * width


def pack(weight_OI: Tensor) -> Bitmask:
    """Exactly ``weight_OI`` (bfloat16, float16, float32 or int8, on the CPU), bits and all."""
    rows, columns = weight_OI.shape
    bits_OI = bits_of(weight_OI.contiguous())
    nonzeros = int(bits_OI.count_nonzero())
    values = bits_OI.new_zeros(_with_room(nonzeros, bits_OI.element_size()))
    mask = torch.empty(rows, 8 * -(-columns // 64), dtype=torch.uint8)
    if lib := _library():
        lib.ace_pack(*(each.data_ptr() for each in (bits_OI, mask, values)), rows, columns, bits_OI.element_size())
        values[nonzeros:] = 0
    else:
        keep_OI = bits_OI.numpy() != 0
        values[:nonzeros] = torch.from_numpy(bits_OI.numpy()[keep_OI])
        packed = numpy.packbits(keep_OI, axis=1, bitorder="little")
        mask.copy_(torch.from_numpy(numpy.pad(packed, ((0, 0), (0, mask.shape[1] - packed.shape[1])))))
    return from_parts((rows, columns), mask, values.view(weight_OI.dtype))


def with_scales(codes: Bitmask, scales: Tensor, dtype: torch.dtype) -> Bitmask:
    """The matrix code * scale, rounded to ``dtype``; scales bfloat16 (O, G). ValueError where they do not fit."""
    rows, columns = codes.shape
    fits = codes.values.dtype == torch.int8 and scales.dim() == 2 and len(scales) == rows and scales.shape[1] > 0
    if not fits or columns % scales.shape[1]:
        raise ValueError(f"scales {tuple(scales.shape)} do not fit a {rows} x {columns} matrix")
    return replace(codes, scales=scales.contiguous(), rounded_to=dtype)


def from_parts(shape: tuple[int, int], mask: Tensor, values: Tensor) -> Bitmask:
    """A packed matrix of its stored parts. Raises ValueError where they do not belong together."""
    rows, columns = shape
    fits = mask.shape == (rows, 8 * -(-columns // 64))
    counts = _bits_in_rows(mask) if fits else torch.zeros(rows, dtype=torch.int64)
    count, bits = int(counts.sum()), bits_of(values)
    fits &= len(values) == _with_room(count, values.element_size()) and not bits[count:].any()
    if not fits or (count and not bits[count - 1]):
        raise ValueError(f"mask {tuple(mask.shape)} and {len(values)} values are no {rows} x {columns} matrix")
    return Bitmask(shape, mask, values, counts.cumsum(0) - counts)


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory as integers: equal only where every bit is."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def unpack(packed: Bitmask, out: Tensor | None = None) -> Tensor:
    """The matrix (O, I) again, bit for bit; in the memory of ``out`` (at least O I, flat, of its dtype) if given."""
    rows, columns = packed.shape
    room = packed.mask.new_empty(rows * columns, dtype=packed.dtype) if out is None else out[: rows * columns]
    if (lib := _library()) is None or packed.mask.device.type != "cpu" or not packed.compiled:
        return _unpack_slowly(packed, room.view(rows, columns))
    job = _job(packed, None, None, room, 1)
    lib.ace_unpack(ctypes.byref(job), *_threads())
    return room.view(rows, columns)


def why_slow(dtype: torch.dtype) -> str:
    """Why ``product`` is not to be had for weights of this type here, in one line; empty where it is.

    Where it would be slower than torch's dense one it is not offered: float16 without AVX-512 VBMI2.
    """
    if dtype not in _TYPES:
        return f"there is no packed product of {dtype}"
    try:
        name = native.library("packed").ace_name
    except native.NoKernel as fault:
        return str(fault)
    name.restype = ctypes.c_char_p
    if dtype == torch.float16 and name() == b"avx2":
        return "without AVX-512 VBMI2 a packed product of float16 is slower than a dense one"
    return ""


def product(packed: Bitmask, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b -> (T, O), summed in float32, in the dtype of W. If ``compiled``, on a CPU where ``why_slow`` is empty.

    Of codes it is that of code * scale, not rounded to the dtype as ``unpack`` does.
    """
    lib = _library()
    assert lib is not None and packed.compiled
    x_TI = x_TI.to(torch.bfloat16 if packed.dtype == torch.bfloat16 and _x_is_bfloat16() else torch.float32)
    if x_TI.shape[1] % 64:
        x_TI = torch.nn.functional.pad(x_TI, (0, -x_TI.shape[1] % 64))
    if packed.scales is not None and x_TI.dtype == torch.bfloat16:
        x_TI = interleaved(x_TI)
    x_TI = x_TI.contiguous()
    out_TO = packed.mask.new_empty(len(x_TI), packed.shape[0], dtype=packed.dtype)
    job = _job(packed, x_TI, bias_O, out_TO, len(x_TI))
    lib.ace_product(ctypes.byref(job), *_threads())
    return out_TO


def interleaved(x_TI: Tensor) -> Tensor:
    """Of every 64 columns first the lower eight of each sixteen: as the bytes of codes come together."""
    return x_TI.view(len(x_TI), -1, 4, 2, 8).transpose(2, 3).reshape(x_TI.shape)


# --- the compiled code -------------------------------------------------------------------------------------------


class _Job(ctypes.Structure):
    """As packed.c has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("mask", "values", "starts", "x", "bias", "y", "scales")),
        *((name, ctypes.c_int64) for name in ("rows", "words", "columns", "tokens", "groups", "shift")),
        ("type", ctypes.c_int32), ("chunk", ctypes.c_int32), ("next", ctypes.c_int64),
    ]  # fmt: skip


@cache
def _library() -> ctypes.CDLL | None:
    try:
        lib = native.library("packed")
    except native.NoKernel:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.ace_pack.argtypes, lib.ace_pack.restype = (pointer, pointer, pointer, number, number, ctypes.c_int), None
    for function in (lib.ace_product, lib.ace_unpack):
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int), None
    return lib


@cache
def _x_is_bfloat16() -> bool:
    """Whether the product of a bfloat16 matrix takes its inputs so, or in float32 as the others."""
    lib = _library()
    return lib is not None and bool(lib.ace_x_is_bfloat16())


def _job(packed: Bitmask, x: Tensor | None, bias: Tensor | None, out: Tensor, tokens: int) -> _Job:
    pointers = (packed.mask, packed.values, packed.starts, x, bias, out, packed.scales)
    (rows, columns), words = packed.shape, packed.mask.shape[1] // 8
    groups = 1 if packed.scales is None else packed.scales.shape[1]
    shift = _ALL if groups == 1 else (columns // groups // 16).bit_length() - 1
    return _Job(
        *(None if tensor is None else tensor.data_ptr() for tensor in pointers),
        rows, words, columns, tokens, groups, shift, _TYPES[packed.dtype], _CHUNK, 0,
    )  # fmt: skip


def _threads() -> tuple[ctypes.c_void_p | None, int]:
    return native.parallel(), torch.get_num_threads()


def _unpack_slowly(packed: Bitmask, out_OI: Tensor) -> Tensor:
    (rows, columns), mask = packed.shape, packed.mask
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    keep_OI = ((mask[:, :, None] >> bits) & 1).bool().view(rows, -1)[:, :columns]
    first = int(packed.starts[0]) if rows else 0
    values = packed.values[first : first + int(keep_OI.sum())]
    if packed.scales is not None:
        scale_OI = packed.scales.float().repeat_interleave(columns // packed.scales.shape[1], dim=1)
        values = (values * scale_OI[keep_OI]).to(packed.dtype)
    out_OI.zero_()[keep_OI] = values
    return out_OI


def _bits_in_rows(mask: Tensor) -> Tensor:
    """(O,) how many bits of each row are set."""
    return torch.from_numpy(numpy.bitwise_count(mask.numpy()).sum(axis=1, dtype=numpy.int64))


def _with_room(nonzeros: int, width: int) -> int:
    """Elements of ``values``."""
    return (math.ceil(nonzeros * width / ROOM) + 1) * ROOM // width
