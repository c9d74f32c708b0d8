#!/bin/sh
# A cron job that needs an API key while it runs. In the crontab:
#
#   15 3 * * *  KEYPOOL_URL=http://127.0.0.1:8888 KEYPOOL_TOKEN_FILE=/etc/keypool/token /opt/nightly.sh
#
# `keypool run` waits for a key, puts it into the environment of the command, and gives it back when that ends,
# however it ends; the exit status is the command's. 125 is keypool's own: no key, or no server.
set -u

keypool run --wait 60 --env API_KEY -- sh -c '
    # What stands for the job. The key is in $API_KEY; keep it off command lines, which everybody can see.
    printf "exporting with a key of %s characters\n" "${#API_KEY}"
'
status=$?

if [ "$status" -eq 125 ]; then
    echo "no key for the nightly export; it runs again tomorrow" >&2
fi
exit "$status"
