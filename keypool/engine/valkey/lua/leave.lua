-- A server stops: nobody waits there.
-- ARGV    1 server
-- answer  available, or -1
-- cost    O(1)
call('HDEL', WAITERS, ARGV[1])
return answer_as_it_was({})
