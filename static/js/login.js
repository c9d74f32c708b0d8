// Who follows a link from another site comes here without the cookie, which is only sent to our own pages' requests.
// This page is one: if the session holds, go on.

const next = document.querySelector("[name=next]").value;
if (!document.getElementById("wrong")) {
  const response = await fetch(location.href, { redirect: "manual" });
  if (response.type === "opaqueredirect") location.replace(next);
}
