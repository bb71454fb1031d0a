"""What a file is, told by its content. Reads a header and a zip directory; runs nothing, imports no torch."""

from __future__ import annotations

import dataclasses
import enum
import os
import struct
import tarfile
from pathlib import Path
from typing import BinaryIO

from bntool.files.regular import open_regular, unreadable
from bntool.files.security.archives import Archive, Damaged, Unsafe

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_SAFETENSORS_HEADER = 100_000_000
_MAX_INDEX = 1 << 24
_HEAD = 4096


class Kind(str, enum.Enum):
    """The kinds of file that bntool tells apart."""

    TORCH_ZIP = "torch-zip"
    TORCH_LEGACY = "torch-legacy"
    TAR = "tar"
    TORCHSCRIPT = "torchscript"
    PT2 = "pt2"
    PT2_AOTI = "pt2-aoti"
    SAFETENSORS = "safetensors"
    SAFETENSORS_INDEX = "safetensors-index"
    ONNX = "onnx"
    EMPTY = "empty"
    GIT_LFS = "git-lfs-pointer"
    HTML = "html"
    GZIP = "gzip"
    NPZ = "npz"
    NPY = "npy"
    GGUF = "gguf"
    HDF5 = "hdf5"
    PICKLE = "pickle"
    ZIP_DAMAGED = "zip-damaged"
    ZIP_UNSAFE = "zip-unsafe"
    ZIP_OTHER = "zip-other"
    TEXT = "text"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


_RESAVE = "load it where it was made and torch.save the model (or its state_dict) again"
_DESCRIBED: dict[Kind, tuple[str, str]] = {
    Kind.TORCH_ZIP: ("a PyTorch file", ""),
    Kind.TORCH_LEGACY: ("a PyTorch file of the format before 1.6", ""),
    Kind.TAR: ("a tar archive (PyTorch's format before 0.1.10, which cannot be read safely)", _RESAVE),
    Kind.TORCHSCRIPT: ("a TorchScript archive", "torch.save the nn.Module it was made from"),
    Kind.PT2: ("an exported program (.pt2)", "name it as the MODEL itself, without --arch or --weights"),
    Kind.PT2_AOTI: (
        "a compiled AOTInductor package: machine code, in which nothing can be folded",
        "fold the program that it was compiled from (torch.export.save), and compile the result",
    ),
    Kind.SAFETENSORS: ("a safetensors file", ""),
    Kind.SAFETENSORS_INDEX: ("the index of a sharded safetensors model", ""),
    Kind.ONNX: ("an ONNX model", "torch.save the nn.Module it was exported from"),
    Kind.EMPTY: ("an empty file", "download or save it again"),
    Kind.GIT_LFS: ("a Git LFS pointer, not the file itself", "git lfs pull"),
    Kind.HTML: ("a web page, probably an error page saved in place of the file", "download it again"),
    Kind.GZIP: ("a gzip-compressed file", "unpack it first: gunzip"),
    Kind.NPZ: ("a NumPy .npz archive, not a model", _RESAVE),
    Kind.NPY: ("a NumPy array, not a model", _RESAVE),
    Kind.GGUF: ("a GGUF file, which holds no PyTorch model", _RESAVE),
    Kind.HDF5: ("an HDF5 file (Keras?), which holds no PyTorch model", _RESAVE),
    Kind.PICKLE: ("a plain pickle, not a file that torch.save wrote", _RESAVE),
    Kind.ZIP_DAMAGED: ("a zip archive that is cut short or damaged", "download or copy it again"),
    Kind.ZIP_UNSAFE: ("a zip archive that no program of PyTorch or NumPy writes", _RESAVE),
    Kind.ZIP_OTHER: ("a zip archive that holds no PyTorch model", "name the model file inside it"),
    Kind.TEXT: ("a text file", "name a model file, or path/file.py:Class for a class in a script"),
    Kind.UNKNOWN: ("of no kind that bntool knows", "name a .pt, .pth or .safetensors file"),
}


@dataclasses.dataclass(frozen=True)
class FileKind:
    """What a file is: its kind, a detail such as the archive's root folder, and both in words."""

    kind: Kind
    detail: str = ""

    @property
    def description(self) -> str:
        """One line for a person: `a Git LFS pointer, not the file itself`."""
        return _DESCRIBED[self.kind][0]

    @property
    def description_in_full(self) -> str:
        """The description, and for an archive that is refused the reason."""
        return self.description + (f": it {self.detail}" if self.kind is Kind.ZIP_UNSAFE else "")

    @property
    def next_step(self) -> str:
        """What to do about a file of this kind, empty for the kinds that load."""
        return _DESCRIBED[self.kind][1]


def detect(path: str | Path) -> FileKind:
    """Tell a file's kind by its content. `LoadError` when it is missing, a folder, or cannot be read."""
    path = Path(path)
    try:
        with open_regular(path) as file:
            return _detect(file)
    except OSError as error:
        raise unreadable(path, error) from error


def _detect(file: BinaryIO) -> FileKind:
    size = os.fstat(file.fileno()).st_size
    head = file.read(_HEAD)
    if not head:
        return FileKind(Kind.EMPTY)
    if head.startswith(b"version https://git-lfs"):
        return FileKind(Kind.GIT_LFS)
    if _looks_like_html(head):
        return FileKind(Kind.HTML)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _detect_zip(file)
    for magic, kind in (
        (b"\x93NUMPY", Kind.NPY),
        (b"GGUF", Kind.GGUF),
        (b"\x89HDF\r\n\x1a\n", Kind.HDF5),
        (b"\x1f\x8b", Kind.GZIP),
    ):
        if head.startswith(magic):
            return FileKind(kind)
    if _is_tar(head):
        return FileKind(Kind.TAR)
    if _is_safetensors(head, size):
        return FileKind(Kind.SAFETENSORS)
    if head[:1] == b"\x80":
        if _first_pickled_int(head) == _LEGACY_MAGIC:
            return FileKind(Kind.TORCH_LEGACY)
        return FileKind(Kind.PICKLE, f"protocol {head[1]}" if len(head) > 1 else "")
    version = _onnx_ir_version(file, size)
    if version is not None:
        return FileKind(Kind.ONNX, f"IR version {version}")
    if _is_index(head, file):
        return FileKind(Kind.SAFETENSORS_INDEX)
    if _is_text(head):
        return FileKind(Kind.TEXT)
    return FileKind(Kind.UNKNOWN, head[:8].hex())


def _looks_like_html(head: bytes) -> bool:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    return start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--"))


def _detect_zip(file: BinaryIO) -> FileKind:
    try:
        names = list(Archive(file).members)
    except Damaged as error:
        return FileKind(Kind.ZIP_DAMAGED, str(error))
    except Unsafe as error:
        return FileKind(Kind.ZIP_UNSAFE, str(error))
    if not names:
        return FileKind(Kind.ZIP_OTHER, "no members")
    root = names[0].split("/")[0]
    inside = {n[len(root) + 1 :] for n in names if n.startswith(root + "/")}
    if {"archive_format", "models/model.json"} & inside or "serialized_exported_program.json" in names:
        compiled = any("aotinductor" in n for n in names)
        return FileKind(Kind.PT2_AOTI if compiled else Kind.PT2, root)
    # torch.load takes every archive with this member for TorchScript.
    if "constants.pkl" in inside:
        return FileKind(Kind.TORCHSCRIPT, root)
    if "data.pkl" in inside:
        return FileKind(Kind.TORCH_ZIP, root)
    if any(n.endswith(".npy") for n in names):
        return FileKind(Kind.NPZ)
    return FileKind(Kind.ZIP_OTHER, names[0])


def _is_safetensors(head: bytes, size: int) -> bool:
    if size <= 8 or len(head) < 9:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    # No test against the file's size: a file cut inside its header is still told, and refused by its reader.
    return 2 <= length <= _MAX_SAFETENSORS_HEADER and head[8:9] == b"{"


def _is_tar(head: bytes) -> bool:
    """A tar header sums to its own checksum field; the first tar format has no magic."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _first_pickled_int(head: bytes) -> int | None:
    """The integer that the first pickle of the file holds, read without an unpickler."""
    at = 2
    if head[at : at + 1] == b"\x95":
        at += 9
    if head[at : at + 1] != b"\x8a":
        return None
    length = head[at + 1]
    end = at + 2 + length
    return int.from_bytes(head[at + 2 : end], "little", signed=True) if head[end : end + 1] == b"." else None


# field number of onnx.ModelProto -> protobuf wire type (onnx.proto3)
_MODEL_PROTO = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}


def _onnx_ir_version(file: BinaryIO, size: int) -> int | None:
    """ONNX has no magic: the top-level protobuf fields must be ModelProto's and end where the file ends."""
    file.seek(0)
    version: int | None = None
    has_graph = False
    try:
        while file.tell() < size:
            tag = _varint(file)
            field, wire = tag >> 3, tag & 7
            if _MODEL_PROTO.get(field) != wire:
                return None
            value = _varint(file)
            if wire == 2:
                if file.tell() + value > size:
                    return None
                file.seek(value, 1)
            version = value if field == 1 else version
            has_graph = has_graph or field == 7
    except (EOFError, ValueError, OverflowError):
        return None
    return version if has_graph else None


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("varint too long")


def _is_index(head: bytes, file: BinaryIO) -> bool:
    """JSON with a `weight_map`, which stands before or after the metadata."""
    if head.lstrip()[:1] != b"{":
        return False
    file.seek(0)
    return b'"weight_map"' in head or b'"weight_map"' in file.read(_MAX_INDEX)


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        # A character may be cut at the end of what was read.
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in text)
