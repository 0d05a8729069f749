"""What a check of a task has found."""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Report:
    """The result of a check. `facts` has what could be measured; a task with `problems` does not work."""

    task: str
    facts: dict[str, int | float | str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text."""
        facts = self.facts
        lines = [f"task       {self.task}"]
        if "parameters" in facts:
            lines.append(f"model      {facts['parameters']:,} parameters in {facts['tensors']} tensors")
        if "training_s" in facts:
            seconds = f"about {facts['training_s']} s"
            lines.append(f"step       {1000 * float(facts['step_s']):,.1f} ms")
            lines.append(f"training   {facts['steps']:,} steps on {facts['samples']:,} samples: {seconds}")
        if "epsilon" in facts:
            lines.append(f"privacy    one training spends an epsilon of {facts['epsilon']}")
        if "codec" in facts:
            parts = f"in {facts['parts']} part{'s' if facts['parts'] != 1 else ''}"
            lines.append(f"update     {self._size('ternary')}; as float32 {self._size('float32')}")
            lines.append(f"           sent as {facts['codec']} {parts}; encoded and decoded in {facts['codec_s']} s")
        if "test_samples" in facts:
            lines.append(f"evaluation {facts['test_samples']:,} samples: {facts['evaluation_s']} s")
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"problem: {text}" for text in self.problems]
        return [*lines, "not ready: fix the problems above" if self.problems else "ready"]

    def _size(self, codec: str) -> str:
        size = int(self.facts[f"update_{codec}_bytes"])
        return f"{size:,} bytes ({8 * size / int(self.facts['parameters']):.2f} bits a parameter)"
