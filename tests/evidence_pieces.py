"""Pieces of evidence that are no pictures, for tests of the folder that they lie in."""

from runtime.evidence_pack import Reason, Record
from runtime.line.evidence_folder import EvidenceFolder


def fill(folder: EvidenceFolder, numbers: range, why: Reason, size: int = 100) -> list[Record]:
    return [add(folder, number, why, size) for number in numbers]


def add(folder: EvidenceFolder, number: int, why: Reason, size: int = 100) -> Record:
    data = number.to_bytes(4, "big") * (size // 4)

    def describe(name: str, sha256: str) -> Record:
        return Record(
            image=name, sha256=sha256, size=len(data), why=why, reasons=(why,), time="t",
            source="s", frame=str(number), burst="b", verdict="OK",
        )  # fmt: skip

    return folder.add(data, ".png", why, describe)
