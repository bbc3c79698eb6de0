import { auth, signIn, signOut } from "../auth";
import { Talk } from "./Talk";

export default async function Page() {
  const session = await auth();
  return (
    <>
      <header className="bar">
        <p className="brand">Corner Shop</p>
        {session?.user && (
          <form className="account" action={leave}>
            <span>{session.user.name}</span> <button className="quiet">Sign out</button>
          </form>
        )}
      </header>
      <main>
        <h1>Talk to us</h1>
        {session?.user ? <Talk /> : <SignIn />}
      </main>
    </>
  );
}

async function enter(form: FormData) {
  "use server";
  await signIn("credentials", { name: form.get("name"), redirectTo: "/" });
}

async function leave() {
  "use server";
  await signOut({ redirectTo: "/" });
}

function SignIn() {
  return (
    <form className="card" action={enter}>
      <div>
        <label htmlFor="name">Your name</label>
        <div className="row">
          <input id="name" name="name" autoComplete="given-name" autoFocus required maxLength={60} />
          <button className="primary">Sign in</button>
        </div>
      </div>
    </form>
  );
}
