# Names for those who type make. All the work is in ./run, because a fresh Debian has no make.
# Arguments go to ./run itself: ./run test tests/test_pool.py -x
.PHONY: run test lint bench

run:
	./run

test lint bench:
	./run $@
