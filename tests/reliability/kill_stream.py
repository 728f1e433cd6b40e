"""Uses a stream of pairs as training would, saving its state now and then: PLAN STATE_FILE N_BATCHES.

Stands for a training job: what it has learned is the digest of all rows in their order, saved beside the state.
"""

import hashlib
import json
import sys
from pathlib import Path

from data_scripts.batches.stream_pairs import PairStream
from data_scripts.files import write_json

SAVE_EVERY = 5


def main() -> None:
    plan, saved, n_batches = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    stream = PairStream(plan, batch_size=16, pool_shards=2)
    done, learned = 0, ""
    if saved.exists():
        checkpoint = json.loads(saved.read_text())
        done, learned = checkpoint["done"], checkpoint["learned"]
        stream.load_state_dict(checkpoint["stream"])
    print("started", flush=True)
    while done < n_batches:
        for batch in stream:
            rows = batch.select(["source_soma_joinid", "target_soma_joinid"]).to_pydict()
            learned = hashlib.blake2b((learned + json.dumps(rows)).encode(), digest_size=8).hexdigest()
            done += 1
            if done % SAVE_EVERY == 0 or done == n_batches:
                content = {"done": done, "learned": learned, "stream": stream.state_dict()}
                write_json(content, saved)
            if done == n_batches:
                break


if __name__ == "__main__":
    main()
