"""Fail if pip-audit knows a vulnerability of an installed package; skip with a message if it cannot be asked.

The service that knows vulnerabilities is on the network. A machine without it must still be able to run the checks.
"""

from __future__ import annotations

import json
import subprocess
import sys

UNREACHABLE = ("ConnectionError", "ProxyError", "SSLError", "Timeout", "ServiceError")
"""What the last line of pip-audit's errors contains if the network or the service does not answer."""


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
        if not any(word in reason for word in UNREACHABLE):
            print(f"pip-audit failed: {reason}")
            return 1
        print(f"pip-audit is skipped: the service is not reachable ({reason})")
        return 0
    known = [package for package in packages if "vulns" in package]
    # The service answers for the package in question, or says that it does not know it.
    if not known:
        print(f"pip-audit is skipped: the service knows none of the {len(packages)} installed packages")
        return 0
    bad = [(package["name"], package["version"], fault) for package in known for fault in package["vulns"]]
    for name, version, fault in bad:
        fixed = ", ".join(fault.get("fix_versions", [])) or "no version"
        print(f"{name} {version}: {fault['id']} is fixed in {fixed}")
    print(f"pip-audit: {len(known)} of {len(packages)} packages checked, {len(bad)} vulnerabilities")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
