"""What a check of a task has found."""

from dataclasses import dataclass, field

from ternbus.broker.protocol.ternary import TERNARY


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
            lines.append(f"model      {facts['parameters']:,} parameters in {_counted('tensor', facts['tensors'])}")
        if "training_s" in facts:
            steps, samples = _counted("step", facts["steps"]), _counted("sample", facts["samples"])
            lines.append(f"step       {1000 * float(facts['step_s']):,.1f} ms")
            lines.append(f"training   {steps} on {samples}: about {facts['training_s']} s")
        if "epsilon" in facts:
            lines.append(f"privacy    one training spends an epsilon of {facts['epsilon']}")
        if "codec" in facts:
            private = f"{self._size('private')}; as ternary " if "update_private_bytes" in facts else ""
            lines.append(f"update     {private}{self._size('ternary')}; as float32 {self._size('float32')}")
            parts = _counted("part", facts["parts"])
            lines.append(f"           sent as {self._codec()} in {parts}; encoded and decoded in {facts['codec_s']} s")
        if "test_samples" in facts:
            lines.append(f"evaluation {_counted('sample', facts['test_samples'])}: {facts['evaluation_s']} s")
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"problem: {text}" for text in self.problems]
        return [*lines, "not ready: fix the problems above" if self.problems else "ready"]

    def _codec(self) -> str:
        """The plan's codec; with the ternary one, tensors of few elements are dense, and sent as float32."""
        codec, dense = str(self.facts["codec"]), int(self.facts["dense_parameters"])
        if codec != TERNARY or not dense:
            return codec
        if dense == self.facts["parameters"]:
            return "float32, for want of a tensor large enough for ternary,"
        return f"{codec}, but {_counted('parameter', dense)} as float32,"

    def _size(self, codec: str) -> str:
        size = int(self.facts[f"update_{codec}_bytes"])
        return f"{size:,} bytes ({8 * size / int(self.facts['parameters']):.2f} bits a parameter)"


def _counted(what: str, count: float | str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
