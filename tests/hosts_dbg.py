import faulthandler, sys
import test_hosts as t
def go(rank, main):
    faulthandler.dump_traceback_later(45, exit=False)
    import fcmae.training.heartbeat as h
    real=h._beat
    def noisy(rank,n,over,lost):
        print("beating",rank,n,file=sys.stderr,flush=True)
        try: real(rank,n,over,lost)
        except BaseException as e: print("ENDED BY",repr(e),file=sys.stderr,flush=True); raise
        print("beat over",over.is_set(),file=sys.stderr,flush=True)
    h._beat=noisy
    t.take_part(rank, main)
if __name__=="__main__":
    import os, tempfile, time, numpy as np
    from functools import partial
    from pathlib import Path
    tmp=Path(tempfile.mkdtemp()); data=tmp/"data"
    for split, number in (("train", 24), ("val", 9)):
        images = np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
        t.save_arrays(data / split, images, np.arange(number) % 4)
    gen=t.hosts.__wrapped__() if hasattr(t.hosts,'__wrapped__') else t.hosts._get_wrapped_function()()
    hosts=next(gen)
    words=t.settings("pretrain",data,tmp/"two")
    run=[h.start(partial(go,i,hosts[0].address),["pretrain.py",*words,"resume=auto"],tmp/f"r{i}") for i,h in enumerate(hosts)]
    for _ in range(75):
        time.sleep(1)
        if not any(r.alive() for r in run): break
    for r in run:
        r.kill(); print(r.wait()); print(r.written("output")[-1500:]); print(r.written("errors"))
    next(gen,None)
