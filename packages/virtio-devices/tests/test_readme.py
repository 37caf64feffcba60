"""The package's README says what works: its examples are run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from virtio_driver import Driver, new_loop
from vmm_core.guestmem import GuestMemory

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_device_works_and_breaks_as_it_says(memory: GuestMemory) -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLES[0], names)
    loop = new_loop()
    driver = Driver(names["Shout"]("shout0", loop), memory, loop).start()
    assert driver.request(b"hello ", b"world", 20)[1][:11] == b"HELLO WORLD"
    driver.offer(b"no room")
    driver.kick()
    assert driver.broken
    driver.close()
    loop.close()


def test_the_examples_run_one_after_the_other() -> None:
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(example, names)
    assert len(EXAMPLES) == 2


def test_every_module_is_in_the_table() -> None:
    source = Path(__file__).parent.parent / "src/virtio_devices"
    modules = {path.stem for path in source.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__"}
    assert modules == set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
