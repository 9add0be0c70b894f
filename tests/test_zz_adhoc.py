import pytest
from test_hostile import *  # noqa
import hostile_stores as hs
ALL = {f"index {k}":v.make for k,v in INDEXES.items()} | {f"pack {k}":v.make for k,v in PACKS.items()} | {f"row {k}":v for k,v in ROW_FILES.items()} | {f"older {k}":v[0] for k,v in OLDER.items()} | {f"plan {k}": (lambda c: lambda w: (w.cache/"plan.json").write_bytes(c))(c) for k,c in PLANS.items()}
COMMANDS = {
 "info": ["info","--json"],
 "gc dry": ["gc","--dry-run"],
 "diff": ["diff","cache/A2b","good/A2b"],
 "diff2": ["diff","good/A2b","cache/A2b", "--json"],
 "export tsv": ["export","cache/A2b","--to","tsv","--output","cache/out"],
 "export pt": ["export","cache/A2b","--to","pt","--output","cache/out2"],
 "adopt": ["adopt","cache/A2b","--target","b","--cache-root","cache/adopted", *DATA],
 "merge": ["merge","cache/A2b","--target","b","--cache-root","cache/merged", *DATA],
 "verify all root": ["verify","--all","--target","b","--recompute",*DATA,*TEACHER],
 "export npy": ["export","cache/A2b","--to","npy"],
 "gc": ["gc","--older-than","0"],
 "seal": ["seal","--target","b",*DATA],
 "repair": ["repair","--target","b",*DATA,*TEACHER],
 "open": None,
}
@pytest.mark.parametrize("case", ALL)
def test_adhoc(world, look, template, case):
    shutil.copytree(template.root/"cache", world.root/"good")
    ALL[case](world)
    around=world.root.parent
    before=picture(around,"w/cache")
    import hostile_fence
    outs = all_fenced([python(look) if c is None else command(*c) for c in COMMANDS.values()], world.root, 8)
    after=picture(around,"w/cache")
    for n,o in zip(COMMANDS,outs):
        bad = o.killed or "error: unexpected" in o.said or "Traceback" in o.said or "MemoryError" in o.said or o.seconds>4 or (n=="open" and o.value and o.value["wrong"]) or "Warning" in o.said
        if bad: print("BAD", case,"|",n, o.code,o.kind,o.killed,round(o.seconds,2),o.grown>>20, o.value, o.stderr[-500:].replace("\n"," / "), o.stdout[-200:].replace("\n"," / "))
        else: print("ok", case,"|",n, o.code,o.kind, o.value, o.stderr[:150].replace("\n"," / "))
    if after!=before: print("BAD outside", case, [k for k in set(before)|set(after) if before.get(k)!=after.get(k)])
    if len(outs)<len(COMMANDS) : print("BAD short", case)
