// The key that is open beside a page is the fragment of its address. Browsers don't send that, so it is added here to the
// address that the sign-in returns to.
//
// A user who follows a link from another site comes here without the cookie, because it is SameSite=Strict. This page's own
// request has it: if the session is valid, go on.

const next = document.querySelector("[name=next]");
next.value = next.getAttribute("value") + location.hash;
if (!document.getElementById("wrong")) {
  const response = await fetch(location.href, { redirect: "manual" });
  if (response.type === "opaqueredirect") location.replace(next.value);
}
