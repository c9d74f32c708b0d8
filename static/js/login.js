// What is open beside a page stands behind the # of its address, which no server is told: so it is added here to where the
// sign-in leads.
//
// A user who follows a link from another site comes here without the cookie, because it is SameSite=Strict. This page's own
// request has it: if the session is valid, go on.

const next = document.querySelector("[name=next]");
next.value = next.getAttribute("value") + location.hash;
if (!document.getElementById("wrong")) {
  const response = await fetch(location.href, { redirect: "manual" });
  if (response.type === "opaqueredirect") location.replace(next.value);
}
