"""How long the page's visitors wait, and what they leave in its memory: python demo/visitors.py ADDRESS [--pid PID]

Each visitor opens the page, then asks for another mask, or paints one, as soon as the last picture has come and been
looked at for a while. Only for a server of your own.
"""

import argparse
import json
import random
import statistics
import threading
import time
import uuid
from pathlib import Path

import httpx  # comes with gradio


class Visitor:
    """One session, as the page's own scripts would hold it."""

    def __init__(self, address: str, http: httpx.Client) -> None:
        self.address, self.http, self.session = address, http, uuid.uuid4().hex
        config = http.get(f"{address}/config").json()
        self.functions = {entry["api_name"]: entry["id"] for entry in config["dependencies"]}
        values = {part["id"]: part["props"].get("value") for part in config["components"]}
        first = next(entry for entry in config["dependencies"] if entry["api_name"] == "start")
        self.begin = [values[part] for part in first["inputs"]]

    def ask(self, name: str, data: list, event: dict | None = None) -> float:
        """One event -> seconds until its answer was here."""
        start = time.perf_counter()
        body = {"data": data, "fn_index": self.functions[name], "session_hash": self.session, "event_data": event}
        self.http.post(f"{self.address}/gradio_api/queue/join", json=body).raise_for_status()
        where = {"session_hash": self.session}
        with self.http.stream("GET", f"{self.address}/gradio_api/queue/data", params=where) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:") and (told := json.loads(line[5:]))["msg"] == "process_completed":
                    if not told["success"]:
                        raise RuntimeError(told["output"])
                    return time.perf_counter() - start
        raise RuntimeError("the server hung up")


def megabytes(pid: int | None) -> str:
    """The memory of a process, from Linux's /proc."""
    if pid is None:
        return ""
    kilobytes = int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])
    return f", the server holds {kilobytes / 1024:.0f} MB"


def main() -> None:
    """Read the command line, send the visitors, print what they saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the page, such as http://127.0.0.1:7860")
    parser.add_argument("--visitors", type=int, default=20, help="at once (default: 20)")
    parser.add_argument("--requests", type=int, default=300, help="of all visitors together (default: 300)")
    parser.add_argument(
        "--think", type=float, default=5, help="seconds from a picture to a wish, on average (default: 5)"
    )
    parser.add_argument("--pid", type=int, help="of the server, to tell its memory")
    args = parser.parse_args()
    waited, opened, errors = [], [], []

    def visit(number: int) -> None:
        choose = random.Random(number)
        try:
            with httpx.Client(timeout=120) as http:
                visitor = Visitor(args.address, http)
                opened.append(visitor.ask("start", visitor.begin))
                for _ in range(args.requests // args.visitors):
                    time.sleep(choose.uniform(0, 2 * args.think))
                    waited.append(visitor.ask("mask_again", [None, choose.randint(50, 90), choose.randint(0, 100)]))
        except Exception as error:  # told at the end
            errors.append(repr(error))

    print(f"before{megabytes(args.pid)}")
    threads = [threading.Thread(target=visit, args=(i,)) for i in range(args.visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for what, seconds in (("opening the page, all at once", opened), ("another mask", waited)):
        if seconds:
            parts = statistics.quantiles(seconds, n=20) if len(seconds) > 1 else seconds * 19
            middle, most = f"median {parts[9]:.2f} s", f"95 % in {parts[18]:.2f} s"
            print(f"{what}: {len(seconds)} answers, {middle}, {most}, all in {max(seconds):.2f} s")
    print(f"after{megabytes(args.pid)}")
    for error in errors:
        print(f"failed: {error}")


if __name__ == "__main__":
    main()
