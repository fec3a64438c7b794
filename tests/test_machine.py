"""Facts of a machine, read from copies of other machines' files, and from this one."""

import datetime
import os
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import machine

MACHINES = Path(__file__).parent / "machines"
ORIN = MACHINES / "jetson_orin_nano"
THOR = MACHINES / "jetson_thor"
PI = MACHINES / "raspberry_pi_3"
PC = MACHINES / "debian_pc"


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """A copy of the Orin's files, to change."""
    return shutil.copytree(ORIN, tmp_path / "orin")


def test_a_plan_is_bound_to_the_release_of_l4t() -> None:
    here = f"linux-{platform.machine()}"
    assert machine.platform_tag(ORIN) == f"{here} L4T R36.4.3"
    assert machine.platform_tag(THOR) == f"{here} L4T R38.2.2"
    assert machine.platform_tag(PC) == here


def test_jetpack_is_what_dpkg_says_is_installed(orin: Path) -> None:
    assert machine.jetpack(orin) == "6.2+b77"  # and not the 6.1 that was removed
    status = orin / "var/lib/dpkg/status"
    status.write_text(status.read_text().replace("nvidia-jetpack\n", "nvidia-jetpack-runtime\n"))
    assert machine.jetpack(orin) == "6.2+b77"


def test_without_its_packages_jetpack_follows_from_l4t(orin: Path) -> None:
    assert machine.jetpack(THOR) == "7.0, by its L4T"
    (orin / "var/lib/dpkg/status").unlink()
    assert machine.jetpack(orin) == "6.1 or 6.2, by its L4T"
    (orin / "etc/nv_tegra_release").write_text("# R40 (release), REVISION: 1.0, GCID: 1\n")
    assert machine.jetpack(orin) == "unknown JetPack for L4T R40.1.0"
    assert machine.jetpack(PI) is None


@pytest.mark.parametrize(
    ("root", "cpu", "instructions"),
    [
        (ORIN, "Cortex-A78AE", ("asimddp",)),
        (THOR, "Neoverse-V3AE", ("asimddp", "i8mm")),
        (PI, "Cortex-A53", ()),
        (PC, "Intel(R) Pentium(R) CPU N4200 @ 1.10GHz", ()),
    ],
)
def test_the_cpu_has_a_name_and_its_int8_instructions(
    root: Path, cpu: str, instructions: tuple[str, ...]
) -> None:
    assert machine.cpu_model(root) == cpu
    assert machine.int8_instructions(root) == instructions


def test_an_arm_core_that_we_do_not_know_keeps_the_kernels_words(orin: Path) -> None:
    info = orin / "proc/cpuinfo"
    info.write_text(info.read_text().replace("0xd42", "0xfff"))
    assert machine.cpu_model(orin) == "ARMv8 Processor rev 1 (v8l)"
    info.unlink()
    assert machine.cpu_model(orin) == "unknown"


def test_memory_and_swap_are_in_bytes() -> None:
    memory = machine.memory(ORIN)
    assert memory is not None
    assert (memory.total, memory.available) == (7802876 * 1024, 5171200 * 1024)
    assert (memory.swap_total, memory.swap_free) == (3901424 * 1024, 3901424 * 1024)


def test_the_power_mode_is_the_one_chosen_last(orin: Path) -> None:
    modes = ("15W", "25W", "MAXN_SUPER", "7W")
    assert machine.power_mode(orin) == machine.PowerMode(name="15W", offered=modes, chosen=True)
    (orin / "var/lib/nvpmodel/status").write_text("pmode:0002")
    assert machine.power_mode(orin) == machine.PowerMode(
        name="MAXN_SUPER", offered=modes, chosen=True
    )
    (orin / "var/lib/nvpmodel/status").write_text("pmode:0009")
    mode = machine.power_mode(orin)
    assert mode is not None
    assert mode.name == "mode 9"


def test_before_a_power_mode_was_chosen_it_is_the_default() -> None:
    mode = machine.power_mode(THOR)
    assert mode is not None
    assert (mode.name, mode.chosen) == ("120W", False)
    assert machine.power_mode(PI) is None


def test_clocks_that_may_not_move_are_pinned() -> None:
    clocks = machine.frequencies(ORIN)
    assert clocks == {
        "cpu0": machine.Frequency(current=729, lowest=729, highest=1510),
        "17000000.gpu": machine.Frequency(current=306, lowest=306, highest=624),
    }
    assert not clocks["17000000.gpu"].pinned
    assert {name for name, clock in machine.frequencies(THOR).items() if clock.pinned} == {
        "gpu-gpc-0",
        "gpu-nvd-0",
    }
    assert machine.governor(ORIN) == "schedutil"
    assert machine.governor(PC) is None


def test_cores_may_have_different_governors(orin: Path) -> None:
    (orin / "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor").write_text("performance\n")
    assert machine.governor(orin) == "performance, schedutil"


def test_the_hottest_zone_comes_first_and_one_that_is_off_is_left_out() -> None:
    assert list(machine.temperatures(ORIN).items()) == [
        ("tj-thermal", 63.781),
        ("cpu-thermal", 63.625),
        ("gpu-thermal", 60.718),
    ]
    assert "gpu-thermal" not in machine.temperatures(THOR)  # its GPU is powered down


def test_only_what_slows_something_down_is_throttling() -> None:
    assert machine.throttling(ORIN) == ("gpu-throttle-alert",)  # neither the fan nor cpufreq
    assert machine.throttling(THOR) == ()
    assert machine.overcurrent_events(ORIN) == {"oc1": 1, "oc2": 0, "oc3": 2}


def test_the_driver_and_its_gpus_have_names() -> None:
    assert machine.nvidia_driver(ORIN) == "540.4.0"
    assert machine.nvidia_driver(THOR) == "580.00"
    assert machine.nvidia_driver(PC) == "570.195.03"
    assert machine.nvidia_driver(PI) is None
    assert machine.gpus(PC) == ("NVIDIA RTX A2000 12GB",)


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        (".dockerenv", "", "Docker"),
        ("run/.containerenv", "engine=podman\n", "Podman"),
        ("proc/1/cgroup", "0::/kubepods/burstable/pod1\n", "Kubernetes"),
        ("proc/1/cgroup", "0::/init.scope\n", None),
    ],
)
def test_a_container_gives_itself_away(
    tmp_path: Path, file: str, content: str, kind: str | None
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    assert machine.container(tmp_path) == kind


@pytest.mark.parametrize(("state", "synchronised"), [(0, True), (1, True), (5, False), (-1, False)])
def test_the_kernel_says_whether_its_clock_is_synchronised(
    monkeypatch: pytest.MonkeyPatch, state: int, synchronised: bool
) -> None:
    libc = SimpleNamespace(adjtimex=lambda timex: state)
    monkeypatch.setattr("runtime.machine.ctypes.CDLL", lambda name: libc)
    assert machine.clock_synchronised() is synchronised


@pytest.mark.parametrize("root", [ORIN, THOR, PI, PC], ids=lambda root: root.name)
def test_a_machine_is_described_whole(root: Path) -> None:
    here = machine.describe(root)
    model = (root / "proc/device-tree/model").exists()
    assert here.model == (
        (root / "proc/device-tree/model").read_text().rstrip("\0") if model else "UP Squared"
    )
    assert f"{here.kernel}\n" == (root / "proc/sys/kernel/osrelease").read_text()
    assert here.distribution is not None
    assert f'PRETTY_NAME="{here.distribution}"' in (root / "etc/os-release").read_text()


def test_a_machine_that_says_nothing_is_described_as_unknown(tmp_path: Path) -> None:
    here = machine.describe(tmp_path)
    assert here.kernel == platform.release()
    assert here.cpu == "unknown"
    nothing = (here.model, here.distribution, here.memory, here.power_mode, here.governor)
    assert nothing == (None,) * 5
    assert (here.frequencies, here.temperatures, here.gpus) == ({}, {}, ())


def test_this_machine_is_described_as_the_operating_system_sees_it() -> None:
    here = machine.describe()
    assert here.memory is not None
    assert here.memory.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert here.cores == len(os.sched_getaffinity(0))
    assert here.time.tzinfo is datetime.timezone.utc
