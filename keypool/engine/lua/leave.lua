-- A server stops: nobody waits there, and unless another one looks, none serves the pool.
-- ARGV    1 server
-- answer  available, or -1
-- cost    O(1)
call('HDEL', META, 'seen')
call('HDEL', WAITERS, ARGV[1])
return answer_as_it_was({})
